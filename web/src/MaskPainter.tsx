// Paints where the first image is to be made anew: clear there, opaque elsewhere.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { upload } from "./api";
import { mask, type Reference } from "./draft";
import { report } from "./session";
import { t } from "./words";

const INK = "#00e0ff";
const BRUSH_FIRST = 12;
const BRUSH_MAX = 40;
/** The brush and its steps, in hundredths of the image's longer edge. */
const HUNDREDTH = 0.01;
const STEP = 2;
/** How high a picture is shown, in hundredths of the window's height. */
const ROOM_VH = 52;

interface Point {
  x: number;
  y: number;
}
interface Stroke {
  points: Point[];
  width: number;
}

interface Props {
  reference: Reference;
  close: () => void;
}

export function MaskPainter({ reference, close }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const strokes = useRef<Stroke[]>([]);
  const at = useSignal<Point | null>(null);
  const brush = useSignal(BRUSH_FIRST);
  const busy = useSignal(false);
  const drawing = useRef(false);
  const rested = useRef<Point>({ x: 0, y: 0 });
  const room = useSignal("100%");

  useEffect(() => dialog.current?.showModal(), []);

  const edge = (): number => Math.max(canvas.current?.width ?? 1, canvas.current?.height ?? 1);
  const begin = (point: Point): void => {
    strokes.current.push({ points: [point], width: brush.value * HUNDREDTH * edge() });
    repaint();
  };
  const repaint = (): void => {
    if (canvas.current) paint(canvas.current, strokes.current);
  };
  const pointed = (event: PointerEvent): Point => {
    const found = event.currentTarget as HTMLCanvasElement;
    const box = found.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * found.width,
      y: ((event.clientY - box.top) / box.height) * found.height,
    };
  };
  const keyed = (event: KeyboardEvent): void => {
    const found = event.currentTarget as HTMLCanvasElement;
    const step = STEP * HUNDREDTH * edge();
    const now = at.value ?? { x: found.width / 2, y: found.height / 2 };
    const moves: Record<string, Point> = {
      ArrowLeft: { x: -step, y: 0 },
      ArrowRight: { x: step, y: 0 },
      ArrowUp: { x: 0, y: -step },
      ArrowDown: { x: 0, y: step },
    };
    const move = moves[event.key];
    if (move) {
      at.value = {
        x: Math.min(Math.max(now.x + move.x, 0), found.width),
        y: Math.min(Math.max(now.y + move.y, 0), found.height),
      };
    } else if (event.key === " ") begin(now);
    else if (event.key === "+") brush.value = Math.min(brush.value + 1, BRUSH_MAX);
    else if (event.key === "-") brush.value = Math.max(brush.value - 1, 1);
    else return;
    event.preventDefault();
  };
  const save = async (): Promise<void> => {
    if (!canvas.current) return;
    busy.value = true;
    try {
      const file = await masked(canvas.current);
      mask.value = (await upload(file, "mask.png", () => undefined)).file_id;
      close();
    } catch (error) {
      report(error);
      close();
    }
  };
  const shown = canvas.current;
  return (
    <dialog ref={dialog} class="painter" aria-labelledby="mask-title" onClose={close}>
      <h2 id="mask-title">{t("mask.title")}</h2>
      <p class="fine" id="mask-how">
        {t("mask.how")}
      </p>
      <div class="easel" style={{ width: room.value }}>
        <img
          src={reference.url}
          alt=""
          onLoad={(event) => {
            if (!canvas.current) return;
            const { naturalWidth, naturalHeight } = event.currentTarget;
            canvas.current.width = naturalWidth;
            canvas.current.height = naturalHeight;
            room.value = `min(100%, ${(ROOM_VH * naturalWidth) / naturalHeight}vh)`;
            repaint();
          }}
        />
        <canvas
          ref={canvas}
          tabIndex={0}
          role="application"
          aria-label={t("mask.canvas")}
          aria-describedby="mask-how"
          onKeyDown={keyed}
          onFocus={(event) => {
            const found = event.currentTarget;
            at.value ??= { x: found.width / 2, y: found.height / 2 };
          }}
          onPointerDown={(event) => {
            event.currentTarget.setPointerCapture(event.pointerId);
            drawing.current = true;
            begin(pointed(event));
          }}
          onPointerMove={(event) => {
            // Browsers say so too when something moves under a pointer that rests: the
            // brush stays where the keyboard put it.
            if (event.clientX === rested.current.x && event.clientY === rested.current.y) return;
            rested.current = { x: event.clientX, y: event.clientY };
            at.value = pointed(event);
            if (!drawing.current) return;
            strokes.current.at(-1)?.points.push(at.value);
            repaint();
          }}
          onPointerUp={() => (drawing.current = false)}
        />
        {at.value && shown && (
          <span
            class="brush"
            style={{
              left: `${(100 * at.value.x) / shown.width}%`,
              top: `${(100 * at.value.y) / shown.height}%`,
              width: `${(brush.value * edge()) / shown.width}%`,
            }}
          />
        )}
      </div>
      <label class="inline">
        {t("mask.brush")}
        <input
          type="range"
          min={1}
          max={BRUSH_MAX}
          value={brush.value}
          onInput={(event) => (brush.value = event.currentTarget.valueAsNumber)}
        />
      </label>
      <div class="row">
        <button
          type="button"
          onClick={() => {
            strokes.current.pop();
            repaint();
          }}
        >
          {t("mask.undo")}
        </button>
        <button
          type="button"
          onClick={() => {
            strokes.current = [];
            repaint();
          }}
        >
          {t("mask.clear")}
        </button>
        <span class="gap" />
        <button type="button" onClick={close}>
          {t("mask.cancel")}
        </button>
        <button type="button" class="main" disabled={busy.value} onClick={() => void save()}>
          {t("mask.save")}
        </button>
      </div>
    </dialog>
  );
}

function paint(canvas: HTMLCanvasElement, strokes: Stroke[]): void {
  const context = canvas.getContext("2d");
  if (!context) return;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = context.fillStyle = INK;
  context.lineCap = "round";
  context.lineJoin = "round";
  for (const { points, width } of strokes) {
    const [first] = points;
    if (!first) continue;
    // A line to where it began is none: a single touch is a dot of its own.
    context.beginPath();
    context.arc(first.x, first.y, width / 2, 0, 2 * Math.PI);
    context.fill();
    context.lineWidth = width;
    context.beginPath();
    for (const { x, y } of points) context.lineTo(x, y);
    context.stroke();
  }
}

async function masked(painted: HTMLCanvasElement): Promise<Blob> {
  const made = document.createElement("canvas");
  made.width = painted.width;
  made.height = painted.height;
  const context = made.getContext("2d");
  if (context) {
    context.fillRect(0, 0, made.width, made.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(painted, 0, 0);
  }
  return new Promise((resolve, reject) =>
    made.toBlob((file) => (file ? resolve(file) : reject(new Error("no mask")))),
  );
}
