"""snake_case on input."""

from __future__ import annotations

import pytest

from equipment.api import TELESCOPE
from lrm.api.wirenames import to_wire
from lrm.errors import Invalid


def test_fields_of_models_are_renamed_at_every_depth() -> None:
    given = {
        "api_version": "x",
        "metadata": {"resource_version": "5", "owner_references": [{"block_owner_deletion": True}]},
        "spec": {"mirror": {"diameter_cm": 3}, "eyepieces": [{"focal_mm": 1, "brand_name": "b"}]},
    }
    assert to_wire(TELESCOPE, given) == {
        "apiVersion": "x",
        "metadata": {"resourceVersion": "5", "ownerReferences": [{"blockOwnerDeletion": True}]},
        "spec": {"mirror": {"diameterCm": 3}, "eyepieces": [{"focalMm": 1, "brandName": "b"}]},
    }


def test_keys_that_are_data_stay() -> None:
    given = {"metadata": {"labels": {"my_label": "x", "diameter_cm": "y"}}, "spec": {"tags": {"focal_mm": "z"}}}
    assert to_wire(TELESCOPE, given) == given


def test_wrong_shapes_and_unknown_names_pass_through_to_be_told_later() -> None:
    given = {"spec": {"mirror": [1], "eyepieces": {"focal_mm": 1}, "no_such": {"diameter_cm": 1}}, "metadata": None}
    assert to_wire(TELESCOPE, given) == given


def test_a_field_under_both_names_is_refused_with_its_path() -> None:
    with pytest.raises(Invalid) as refused:
        to_wire(TELESCOPE, {"spec": {"mirror": {"diameterCm": 1, "diameter_cm": 2}}})
    assert [c.field for c in refused.value.causes] == ["spec.mirror.diameterCm"]
