"""Real servers, faults between us and them, and what else the tests stand on; `from equipment.etcd import …`."""
