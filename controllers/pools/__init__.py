"""Pools of workers: as many LabWorkers of one lab track as are needed, and no more."""
