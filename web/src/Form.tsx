// Everything that can be asked for, and what it will cost.
import {
  body,
  choose,
  chosen,
  count,
  estimate,
  format,
  FORMATS,
  hasTier,
  height,
  model,
  models,
  pricing,
  prompt,
  quality,
  RATIOS,
  ratio,
  references,
  tier,
  TIERS,
  uploading,
  width,
  wrong,
} from "./draft";
import { References } from "./References";
import { Refusal } from "./Refusal";
import { balance, generate, sending } from "./tasks";
import { tab } from "./tabs";
import { decimal, t, tOr } from "./words";

export function Form() {
  const submit = (event: Event): void => {
    event.preventDefault();
    tab.value = tab.value === "code" ? "result" : tab.value;
    void generate(body.value, references.value);
  };
  return (
    <form class="card ask" onSubmit={submit} aria-label={t("form.title")}>
      <div class="field">
        <label for="prompt">{t("form.prompt")}</label>
        <textarea
          id="prompt"
          rows={4}
          required
          placeholder={t("form.promptHint")}
          value={prompt.value}
          onInput={(event) => (prompt.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
              event.currentTarget.form?.requestSubmit();
            }
          }}
        />
        <p class="fine num">{t("form.promptCount", { count: decimal([...prompt.value].length) })}</p>
      </div>
      <References />
      <div class="pair">
        <div class="field">
          <label for="model">{t("form.model")}</label>
          <select
            id="model"
            value={model.value}
            translate={false}
            onChange={(event) => choose(event.currentTarget.value)}
          >
            {models.value.map((each) => (
              <option key={each.id} value={each.id}>
                {each.id}
              </option>
            ))}
          </select>
        </div>
        <div class="field">
          <label for="count">{t("form.count")}</label>
          <input
            id="count"
            type="number"
            min={1}
            max={chosen.value?.limits.n ?? 10}
            required
            value={count.value}
            onInput={(event) => {
              const entered = event.currentTarget.valueAsNumber;
              if (Number.isInteger(entered)) count.value = entered;
            }}
          />
        </div>
      </div>
      <Chips
        name="ratio"
        legend={t("form.ratio")}
        choices={["auto", ...RATIOS, "custom"]}
        value={ratio.value}
        pick={(value) => (ratio.value = value)}
        show={(value) =>
          value === "auto" || value === "custom" ? t(`form.${value}`) : <Shape ratio={value} />
        }
      />
      {ratio.value === "custom" && <CustomSize />}
      <Pixels />
      <div class="pair">
        <Chips
          name="tier"
          legend={t("form.resolution")}
          choices={TIERS}
          value={tier.value}
          pick={(value) => (tier.value = value)}
          off={!hasTier.value}
          hint={hasTier.value ? null : t("form.resolutionOff")}
        />
        <Chips
          name="quality"
          legend={t("form.quality")}
          choices={chosen.value?.limits.qualities ?? ["low", "medium", "high"]}
          value={quality.value}
          pick={(value) => (quality.value = value)}
          show={(value) => tOr(`form.quality.${value}`, value)}
        />
      </div>
      <Chips
        name="format"
        legend={t("form.format")}
        choices={FORMATS}
        value={format.value}
        pick={(value) => (format.value = value)}
        show={(value) => <span translate={false}>{value.toUpperCase()}</span>}
      />
      <Price />
    </form>
  );
}

interface ChipsProps {
  name: string;
  legend: string;
  choices: readonly string[];
  value: string;
  pick: (value: string) => void;
  show?: (value: string) => preact.ComponentChildren;
  off?: boolean;
  hint?: string | null;
}

export function Chips({ name, legend, choices, value, pick, show, off = false, hint }: ChipsProps) {
  return (
    <fieldset class="chips" disabled={off}>
      <legend>{legend}</legend>
      <div>
        {choices.map((each) => (
          <label key={each}>
            <input
              type="radio"
              name={name}
              value={each}
              checked={value === each}
              onChange={() => pick(each)}
            />
            <span>{show ? show(each) : each}</span>
          </label>
        ))}
      </div>
      {hint && <p class="fine">{hint}</p>}
    </fieldset>
  );
}

const SHAPE_PX = 14;

function Shape({ ratio: text }: { ratio: string }) {
  const [w = 1, h = 1] = text.split(":").map(Number);
  const scale = SHAPE_PX / Math.max(w, h);
  return (
    <>
      <svg viewBox={`0 0 ${SHAPE_PX} ${SHAPE_PX}`} width={SHAPE_PX} height={SHAPE_PX} aria-hidden="true">
        <rect
          x={(SHAPE_PX - w * scale) / 2 + 0.75}
          y={(SHAPE_PX - h * scale) / 2 + 0.75}
          width={w * scale - 1.5}
          height={h * scale - 1.5}
        />
      </svg>
      {text}
    </>
  );
}

function CustomSize() {
  const bad = wrong.value?.param === "size";
  const field = (id: "width" | "height", value: typeof width) => (
    <div class="field">
      <label for={id}>{t(`form.${id}`)}</label>
      <input
        id={id}
        inputMode="numeric"
        pattern="[0-9]+"
        required
        aria-invalid={bad}
        aria-describedby="size-rule"
        value={value.value}
        onInput={(event) => (value.value = event.currentTarget.value.trim())}
      />
    </div>
  );
  return (
    <>
      <div class="pair">
        {field("width", width)}
        {field("height", height)}
      </div>
      <p class="fine" id="size-rule">
        {t("form.sizeRule")}
      </p>
    </>
  );
}

function Pixels() {
  const size = estimate.value?.size;
  return (
    <p class="fine num" aria-live="polite" data-pixels={size}>
      {size === "auto" && t("form.pixelsAuto")}
      {size && size !== "auto" && t("form.pixels", { size: size.replace("x", " × ") })}
    </p>
  );
}

const SHOWN_DIGITS = 6;

function Price() {
  const found = estimate.value;
  const isRange = found !== null && found.low.credits !== found.high.credits;
  return (
    <div class="price">
      {wrong.value && <Refusal error={wrong.value} />}
      <div class="row">
        <div aria-live="polite" aria-busy={pricing.value} class="num">
          <span class="unseen">{t("price.title")}</span>
          {found ? (
            <>
              <strong>
                <Amount value={found.low.credits} name="low-credits" />
                {isRange && <> – <Amount value={found.high.credits} name="high-credits" /></>}{" "}
                {t("price.credits")}
              </strong>
              <span>
                $<Amount value={found.low.usd} name="low-usd" />
                {isRange && <> – $<Amount value={found.high.usd} name="high-usd" /></>}
              </span>
            </>
          ) : (
            <span>{wrong.value ? "–" : t("price.waiting")}</span>
          )}
        </div>
        <button
          type="submit"
          class="main"
          disabled={sending.value || uploading.value || wrong.value !== null}
        >
          {sending.value ? t("go.sending") : t("go.generate")}
        </button>
      </div>
      <p class="fine">
        {uploading.value ? t("go.waitUploads") : isRange ? t("price.range") : t("price.exact")}
        {balance.value !== null && (
          <span class="num"> {t("price.balance", { credits: decimal(balance.value, 2) })}</span>
        )}
      </p>
    </div>
  );
}

function Amount({ value, name }: { value: number; name: string }) {
  return (
    <data value={value} data-amount={name}>
      {decimal(value, SHOWN_DIGITS)}
    </data>
  );
}
