"""The HTTP API in Kubernetes' wire format: handlers write resources and nothing else. Begin with `app`."""
