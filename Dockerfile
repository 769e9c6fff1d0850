# The gateway in an image: built in one stage, run from another, by a user that may write
# nothing but the data volume. How to run it: docs/containers.md.

FROM node:20.20.2-bookworm-slim AS web
WORKDIR /build/web
COPY web/package.json web/package-lock.json web/.npmrc ./
RUN npm ci --no-update-notifier
COPY web ./
RUN npm run build

FROM python:3.13.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
# What it needs comes first and by hash: it changes less often than the gateway itself.
COPY requirements/run.txt requirements/build.txt requirements/
RUN python -m venv --without-pip /opt/imageway \
    && python -m pip --python /opt/imageway/bin/python install --require-hashes -r requirements/run.txt \
    && python -m venv /opt/builder \
    && /opt/builder/bin/python -m pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md ./
COPY gateway gateway
COPY providers providers
COPY config config
COPY --from=web /build/gateway/pages /build/gateway/pages
RUN /opt/builder/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels . \
    && python -m pip --python /opt/imageway/bin/python install --no-deps --no-index --find-links /opt/wheels imageway

FROM python:3.13.12-slim-bookworm
LABEL org.opencontainers.image.title="imageway" \
      org.opencontainers.image.description="A gateway for image models"
RUN groupadd --system --gid 10001 imageway \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/imageway --shell /usr/sbin/nologin imageway \
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/imageway
COPY --from=build /opt/imageway /opt/imageway
ENV PATH=/opt/imageway/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    IMAGEWAY_DATA_DIR=/var/lib/imageway \
    IMAGEWAY__SERVER__HOST=0.0.0.0
USER 10001:10001
WORKDIR /var/lib/imageway
VOLUME /var/lib/imageway
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=8s --start-period=30s --retries=3 \
    CMD ["imageway", "healthcheck"]
CMD ["imageway", "serve"]
