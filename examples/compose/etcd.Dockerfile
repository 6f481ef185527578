# etcd as compose.yaml runs it: Debian testing's, because production wants 3.5.28 or newer.
# Pin the base by its digest for an image that can be made again.
ARG DEBIAN_IMAGE=debian:testing-slim
FROM ${DEBIAN_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends etcd-server etcd-client \
 && rm -rf /var/lib/apt/lists/* \
 && install --directory --owner=10002 --group=10002 --mode=0700 /var/lib/etcd
USER 10002:10002
EXPOSE 2379 2380
CMD ["etcd"]
