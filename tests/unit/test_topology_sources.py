"""Where topologies may come from: the lists of files and addresses, and what cannot get around them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from controllers.instances.kind import LabTemplate
from controllers.instances.runtime import NotNow, Refused
from controllers.instances.settings import InstanceSettings
from controllers.instances.templates import file_allowed, load, url_allowed
from controllers.instances.topology import LARGEST

GOOD = '{"lab": {"version": "0.3.0", "title": "Good"}, "nodes": [], "links": []}'
LISTED = ("https://labs.example.com/ccna/", "http://[::1]:8080", "https://one.example.com/lab.yaml", "nonsense")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://labs.example.com/ccna/a.yaml", "below what is listed"),
        ("https://LABS.Example.com:443/ccna/a.yaml?version=2", "hosts have no case, and https has its port"),
        ("https://labs.example.com/ccna/a;v=1/100%25/..b/c..", "signs that lead nowhere"),
        ("http://[::1]:8080/any/where", "a whole server is listed"),
        ("https://one.example.com/lab.yaml", "exactly what is listed"),
    ],
)
def test_addresses_that_may_be_named(url: str, why: str) -> None:
    assert url_allowed(url, LISTED), why


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://labs.example.com/", "above what is listed"),
        ("https://labs.example.com/ccna-private/a", "a name that only begins alike"),
        ("https://one.example.com/lab.yaml.bak", "a file that only begins alike"),
        ("https://labs.example.com/ccna/../secret", "a step up"),
        ("https://labs.example.com/ccna/%2e%2E/secret", "a step up, in other letters"),
        ("https://labs.example.com/ccna/..%2fsecret", "a step up, with the slash hidden"),
        ("https://labs.example.com/ccna/%252e%252E/secret", "a step up, for whoever decodes twice"),
        ("https://labs.example.com/ccna/%25252e./secret", "a step up, for whoever decodes three times"),
        ("https://labs.example.com/ccna/..;/secret", "a step up, for whoever drops a step's parameters"),
        ("https://labs.example.com/ccna/..%3Bv=1/secret", "the same, in other letters"),
        ("https://labs.example.com/ccna/..\\secret", "a step up, as some servers read it"),
        ("https://labs.example.com.evil.org/ccna/a", "a host that only begins alike"),
        ("https://labs.example.com@evil.org/ccna/a", "a user, not a host"),
        ("https://me:secret@labs.example.com/ccna/a", "credentials"),
        ("http://labs.example.com/ccna/a", "another scheme"),
        ("https://labs.example.com:8443/ccna/a", "another port"),
        ("https://labs.example.com/ccna/a#b", "a fragment is no part of what is fetched"),
        ("https://labs.example.com/ccna/\t../a", "white space, which parsers drop"),
        ("https://labs.ex\u00e4mple.com/ccna/a", "letters that parsers fold"),
        ("https://labs.example.com:port/ccna/a", "no port"),
        ("file:///etc/passwd", "not the web"),
        ("nonsense", "no address, although listed"),
    ],
)
def test_addresses_that_may_not(url: str, why: str) -> None:
    assert not url_allowed(url, LISTED), why


@pytest.fixture
def labs(tmp_path: Path) -> Path:
    """A folder whose `*.yaml` may be named, beside one whose files may not."""
    folder = tmp_path / "labs"
    (folder / "deep").mkdir(parents=True)
    (folder / "good.yaml").write_text("\ufeff" + GOOD)
    (folder / "deep" / "good.yaml").write_text(GOOD)
    (tmp_path / "secret.yaml").write_text(GOOD)
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    (folder / "circle.yaml").symlink_to(folder / "circle.yaml")
    (folder / "inside.yaml").symlink_to(folder / "good.yaml")
    (folder / "bad.yaml").write_text("nodes: [\n")
    (folder / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    (folder / "latin.yaml").write_bytes(b"lab: \xe4")
    (folder / "folder.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")
    return folder


async def no_fetch(url: str) -> str:
    raise AssertionError(f"{url} is asked")


def settings_for(folder: Path) -> InstanceSettings:
    return InstanceSettings(topology_files=(f"{folder}/*.yaml",))


@pytest.mark.parametrize("name", ["good.yaml", "inside.yaml", "deep/../good.yaml"])
async def test_a_file_that_is_listed_is_read(labs: Path, name: str) -> None:
    """What counts is where it really is; a byte order mark is no part of it."""
    assert file_allowed(f"{labs}/{name}", settings_for(labs).topology_files)
    read = await load(LabTemplate(topology_file=f"{labs}/{name}"), settings_for(labs), no_fetch)
    assert read.title == "Good"


@pytest.mark.parametrize(
    ("name", "reason", "told"),
    [
        pytest.param("deep/good.yaml", "TemplateForbidden", "LRM_TOPOLOGY_FILES", id="a star crosses no slash"),
        pytest.param("../secret.yaml", "TemplateForbidden", "LRM_TOPOLOGY_FILES", id="a step up"),
        pytest.param("link.yaml", "TemplateForbidden", "link.yaml leads elsewhere", id="a link that leads out"),
        pytest.param("gone.yaml", "TemplateNotFound", "no file", id="nothing there"),
        pytest.param("circle.yaml", "TemplateNotFound", "cannot be read", id="a link to itself"),
        pytest.param("folder.yaml", "TemplateInvalid", "not a regular file", id="a folder"),
        pytest.param("pipe.yaml", "TemplateInvalid", "not a regular file", id="a pipe, which would never end"),
        pytest.param("large.yaml", "TemplateInvalid", "more than 524288 bytes", id="too large"),
        pytest.param("latin.yaml", "TemplateInvalid", "not UTF-8", id="not UTF-8"),
        pytest.param("bad.yaml", "TemplateInvalid", "line 2, column 1", id="no YAML, and where"),
    ],
)
async def test_a_file_that_will_not_do_is_refused_with_the_reason(
    labs: Path, name: str, reason: str, told: str
) -> None:
    with pytest.raises(Refused, match=told) as refused:
        await load(LabTemplate(topology_file=f"{labs}/{name}"), settings_for(labs), no_fetch)
    assert refused.value.reason == reason


async def test_a_folder_that_is_exchanged_for_a_link_once_it_was_judged_is_not_followed(
    labs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, elsewhere, real_open = labs / "deep", labs.parent / "elsewhere", os.open
    elsewhere.mkdir()
    (elsewhere / "good.yaml").write_text(GOOD.replace("Good", "Secret"))

    def exchanging(*args: Any, **kwargs: Any) -> int:
        if not judged.is_symlink():
            judged.rename(labs / "before")
            judged.symlink_to(elsewhere)
        return real_open(*args, **kwargs)

    monkeypatch.setattr(os, "open", exchanging)
    template = LabTemplate(topology_file=f"{judged}/good.yaml")
    with pytest.raises((Refused, NotNow), match=r"there is no file|cannot be read"):
        await load(template, InstanceSettings(topology_files=(f"{judged}/*.yaml",)), no_fetch)


async def test_nothing_is_listed_unless_settings_say_so(labs: Path) -> None:
    nothing = InstanceSettings()
    for template in (
        LabTemplate(topology_file=f"{labs}/good.yaml"),
        LabTemplate(topology_url="http://127.0.0.1:9/lab.yaml"),
    ):
        with pytest.raises(Refused) as refused:
            await load(template, nothing, no_fetch)
        assert refused.value.reason == "TemplateForbidden"


async def test_an_inline_topology_is_taken_as_it_is() -> None:
    assert (await load(LabTemplate(topology=GOOD), InstanceSettings(), no_fetch)).title == "Good"
    with pytest.raises(Refused, match=r"labTemplate\.topology is no topology: nodes"):
        await load(LabTemplate(topology="lab: {}"), InstanceSettings(), no_fetch)
