// Reference images: dropped, pasted or picked, uploaded at once.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { addFiles, mask, references, remove, type Reference } from "./draft";
import { MaskPainter } from "./MaskPainter";
import { t } from "./words";

export function References() {
  const refused = useSignal<string[]>([]);
  const over = useSignal(false);
  const painting = useSignal(false);
  const picker = useRef<HTMLInputElement>(null);
  const take = async (files: Iterable<File>): Promise<void> => {
    refused.value = await addFiles(files);
  };
  useEffect(() => {
    const pasted = (event: ClipboardEvent): void => {
      const files = event.clipboardData?.files;
      if (!files?.length) return;
      event.preventDefault();
      void take(files);
    };
    addEventListener("paste", pasted);
    return () => removeEventListener("paste", pasted);
  }, []);
  const first = references.value[0];
  return (
    <fieldset
      class={over.value ? "refs over" : "refs"}
      onDragOver={(event) => {
        event.preventDefault();
        over.value = true;
      }}
      onDragLeave={() => (over.value = false)}
      onDrop={(event) => {
        event.preventDefault();
        over.value = false;
        void take(event.dataTransfer?.files ?? []);
      }}
    >
      <legend>{t("refs.title")}</legend>
      <p class="drop">
        {t("refs.drop")}{" "}
        <button type="button" onClick={() => picker.current?.click()}>
          {t("refs.pick")}
        </button>
        <input
          ref={picker}
          id="files"
          type="file"
          multiple
          hidden
          accept="image/png,image/jpeg,image/webp"
          onChange={(event) => {
            const files = [...(event.currentTarget.files ?? [])];
            event.currentTarget.value = "";
            void take(files);
          }}
        />
      </p>
      <p class="fine">{t("refs.rule")}</p>
      {references.value.length > 0 && (
        <ul class="thumbs">
          {references.value.map((each) => (
            <Thumb key={each.id} reference={each} />
          ))}
        </ul>
      )}
      {first?.state === "ready" && (
        <div class="row">
          <button type="button" onClick={() => (painting.value = true)}>
            {mask.value ? t("mask.edit") : t("mask.open")}
          </button>
          {mask.value && (
            <>
              <span class="fine">{t("mask.set")}</span>
              <button type="button" class="quiet" onClick={() => (mask.value = null)}>
                {t("mask.remove")}
              </button>
            </>
          )}
        </div>
      )}
      {refused.value.map((why) => (
        <p key={why} class="warning" role="alert">
          {why}
        </p>
      ))}
      {painting.value && first && (
        <MaskPainter reference={first} close={() => (painting.value = false)} />
      )}
    </fieldset>
  );
}

function Thumb({ reference }: { reference: Reference }) {
  const { id, name, url, share, state } = reference;
  return (
    <li class={state}>
      <img src={url} alt="" />
      <span class="name" translate={false} title={name}>
        {name}
      </span>
      {state === "uploading" ? (
        <progress value={share} aria-label={t("refs.uploading", { name })} />
      ) : (
        <span class="fine">{t(`refs.${state}`)}</span>
      )}
      <button
        type="button"
        class="quiet"
        aria-label={t("refs.remove", { name })}
        onClick={() => remove(id)}
      >
        ×
      </button>
    </li>
  );
}
