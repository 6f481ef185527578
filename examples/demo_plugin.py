"""A plug-in in one page: a kind, a controller that acts once for each step asked for, and what it needs from outside.

A daemon takes it with LRM_PLUGINS=demo_plugin; demo_ha_deployment.py and demo_bookmarks.py are played with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from lrm.controller import Context, Controller, Result
from lrm.kind import Kind
from lrm.model import Model
from lrm.plugin import Plugin, PluginContext
from lrm.resource import Resource, Status
from lrm.settings import LrmSettings

LOCK = "exercises"
API = "/apis/demo.neuroglia.io/v1/namespaces/default/exercises"


class ExerciseSpec(Model):
    step: int = Field(1, ge=1)


class ExerciseStatus(Status):
    done: int = 0


class Exercise(Resource[ExerciseSpec, ExerciseStatus]):
    """Something to do for each step that a person asks for."""

    api_version: str = "demo.neuroglia.io/v1"
    kind: str = "Exercise"


class ExerciseSettings(LrmSettings):
    instance_id: str = Field("", description="Name of this instance.")
    demo_effects: Path | None = Field(None, description="File that stands for the world outside: a line an effect.")


class Exercises(Controller[Exercise]):
    """Does each step once in the world outside, and says so in the status."""

    name = "exercises"
    lock_name = LOCK
    model = Exercise

    def __init__(self, settings: ExerciseSettings) -> None:
        self._settings = settings

    async def reconcile(self, resource: Exercise, ctx: Context) -> Result:
        """Only the leader comes here. The guard's number is its term; the status is written under that guard."""
        step = resource.spec.step
        if resource.status.done == step:
            return Result.done()
        ctx.check_leading()
        (guard,) = ctx.guards()
        self._act(Effect(self._settings.instance_id, guard.create_revision, resource.name, step))

        def observe(exercise: Exercise) -> None:
            exercise.status.done = step

        await ctx.client.update_status(resource, observe)
        return Result.done()

    def _act(self, effect: Effect) -> None:
        narrate(effect.instance, f"reconciles {effect.name}, step {effect.step}")
        if self._settings.demo_effects:
            with self._settings.demo_effects.open("ab") as effects:
                effects.write(orjson.dumps(effect) + b"\n")


@dataclass(frozen=True, slots=True)
class Effect:
    """One line of the effect file."""

    instance: str
    term: int
    name: str
    step: int


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    yield (Exercises(context.settings),)


EXERCISES: Kind[Exercise] = Kind(model=Exercise, plural="exercises", singular="exercise", default_owner=LOCK)
plugin = Plugin(name="exercises", kinds=(EXERCISES,), controllers=controllers, settings=ExerciseSettings)


def exercise(name: str) -> dict[str, Any]:
    return {"apiVersion": "demo.neuroglia.io/v1", "kind": "Exercise", "metadata": {"name": name}, "spec": {"step": 1}}


def narrate(instance: str, text: str) -> None:
    print(f"{instance}: {text}", flush=True)
