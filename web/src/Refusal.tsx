// An error in plain words: what it means here, what the gateway said, how to name it.
import type { ApiError } from "./api";
import { t, tOr } from "./words";

interface Props {
  error: Pick<ApiError, "code" | "message"> & { requestId?: string | null };
  dismiss?: () => void;
}

export function Refusal({ error, dismiss }: Props) {
  return (
    <div class="refusal" role="alert">
      <strong>{t("error.title")}</strong>
      <p>{tOr(`error.${error.code}`, t("error.other"))}</p>
      {error.message && (
        <p class="said" lang="en" translate={false}>
          {error.message}
        </p>
      )}
      {error.code !== "network" && (
        <p class="fine">
          <span translate={false}>{t("error.code", { code: error.code })}</span>
          {error.requestId && (
            <span translate={false}> · {t("error.request", { id: error.requestId })}</span>
          )}
        </p>
      )}
      {dismiss && (
        <button type="button" class="quiet" onClick={dismiss}>
          {t("error.dismiss")}
        </button>
      )}
    </div>
  );
}
