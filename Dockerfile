# The daemon's image: `docker build --tag lrm .`; compose.yaml and examples/kubernetes/ say how to run it.
# Versions are those of constraints.txt; pin the base by its digest for an image that can be made again:
#   docker build --build-arg PYTHON_IMAGE=python@sha256:… .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/lrm \
 && /opt/lrm/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --constraint constraints.txt .

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/lrm /opt/lrm
ENV PATH=/opt/lrm/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
# No such user need exist: the daemon asks for none, and writes nowhere but to its output (and LRM_AUDIT_FILE).
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["lrm"]
CMD ["serve"]
