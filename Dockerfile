# The operator. Build context: the repository.
# BASE_IMAGE: any Debian-like image with python3 (>= 3.11) and its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
COPY requirements/build.txt requirements/operator.txt /src/requirements/
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir --require-hashes -r /src/requirements/build.txt \
 && python3 -m venv --without-pip /opt/headrace
# Where uv keeps downloads during the build; never part of the image.
ARG UV_CACHE_DIR=/root/.cache/uv
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/build/bin/uv pip install --system-certs --compile-bytecode --no-deps --require-hashes \
      --python /opt/headrace/bin/python -r /src/requirements/operator.txt
COPY operator /src/operator
RUN cd /src/operator && /opt/build/bin/python -m hatchling build -t wheel -d /src/wheels \
 && /opt/build/bin/uv pip install --offline --compile-bytecode --no-deps \
      --python /opt/headrace/bin/python /src/wheels/*.whl

FROM ${BASE_IMAGE}
COPY --from=build /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 1000:1000
ENTRYPOINT ["headrace-operator"]
