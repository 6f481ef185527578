"""Request bodies as the API document has them: strict types, no unknown key, the documented limits.

`controllers.cml.simulator.routing` turns what pydantic finds wrong into CML's 400. Only bodies of simulated endpoints
are here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

UUID4 = r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"

Id = Annotated[str, Field(pattern=UUID4)]
Title = Annotated[str, Field(min_length=1, max_length=64)]
Description = Annotated[str, Field(max_length=4096)]
Notes = Annotated[str, Field(max_length=32768)]
Label = Annotated[str, Field(min_length=1, max_length=128)]
ElementId = Annotated[str, Field(min_length=1, max_length=64)]
Username = Annotated[str, Field(min_length=1, max_length=32)]
Coordinate = Annotated[int, Field(ge=-15000, le=15000)]
DefinitionId = Annotated[
    str, Field(min_length=1, max_length=250, pattern=r"^[^.!@#%^&*();$\n\r\t/\\][^!@#%^&*();$\n\r\t/\\]*$")
]
Mac = Annotated[str, Field(pattern=r"^[a-fA-F0-9]{2}(:[a-fA-F0-9]{2}){5}$")]
Permission = Literal["lab_admin", "lab_edit", "lab_exec", "lab_view"]
Number = Annotated[int, Field(ge=-(2**53), le=2**53)]
Scalar = str | Number | float | bool | None
Text = Annotated[str, Field(max_length=128)]


class Body(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Credentials(Body):
    username: Username
    password: str


class Association(Body):
    id: Id
    permissions: list[Permission]


class Associations(Body):
    groups: list[Association] = Field(default_factory=list)
    users: list[Association] = Field(default_factory=list)


class OldGroup(Body):
    id: Id
    permission: Literal["read_only", "read_write"]
    name: str | None = None


class Autostart(Body):
    """Since 2.10."""

    enabled: bool | None = None
    priority: Number | None = None
    delay: Number | None = None


class NodeStaging(Body):
    """Since 2.10."""

    enabled: bool | None = None
    abort_on_failure: bool | None = None
    start_remaining: bool | None = None


class LabBody(Body):
    """Of create and of update, up to 2.9."""

    title: Title | None = None
    owner: Id | None = None
    description: Description | None = None
    notes: Notes | None = None
    groups: list[OldGroup] | None = None
    associations: Associations | None = None


class LabBody210(LabBody):
    autostart: Autostart | None = None
    node_staging: NodeStaging | None = None


class ConfigurationFile(Body):
    name: Annotated[str, Field(max_length=64)]
    content: str | None = None


Configuration = str | ConfigurationFile | list[ConfigurationFile] | None


class NodeFields(Body):
    """What nodes have wherever they are written."""

    parameters: dict[str, Scalar] | None = None
    image_definition: DefinitionId | None = None
    ram: Annotated[int, Field(ge=1, le=1048576)] | None = None
    cpus: Annotated[int, Field(ge=1, le=128)] | None = None
    cpu_limit: Annotated[int, Field(ge=20, le=100)] | None = None
    data_volume: Annotated[int, Field(ge=0, le=4096)] | None = None
    boot_disk_size: Annotated[int, Field(ge=0, le=4096)] | None = None
    hide_links: bool | None = None
    tags: list[Annotated[str, Field(max_length=64)]] | None = None
    configuration: Configuration = None


class NodeBody(NodeFields):
    x: Coordinate
    y: Coordinate
    label: Label
    node_definition: DefinitionId


class NodePatch(NodeFields):
    x: Coordinate | None = None
    y: Coordinate | None = None
    label: Label | None = None
    pinned_compute_id: Id | None = None


class InterfaceBody(Body):
    node: Id
    slot: Annotated[int, Field(ge=0, le=128)] | None = None
    mac_address: Mac | None = None


class InterfacePatch(Body):
    mac_address: Mac | None = None


class LinkBody(Body):
    src_int: Id
    dst_int: Id


Percent = float | int


class ConditionBody(Body):
    bandwidth: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    latency: Annotated[int, Field(ge=0, le=10_000)] | None = None
    delay_corr: Percent | None = None
    limit: Annotated[int, Field(ge=0, le=10_000)] | None = None
    loss: Percent | None = None
    loss_corr: Percent | None = None
    gap: Annotated[int, Field(ge=0, le=10_000)] | None = None
    duplicate: Percent | None = None
    duplicate_corr: Percent | None = None
    jitter: Annotated[int, Field(ge=0, le=10_000)] | None = None
    reorder_prob: Percent | None = None
    reorder_corr: Percent | None = None
    corrupt_prob: Percent | None = None
    corrupt_corr: Percent | None = None
    enabled: bool | None = None


class TopologyInterface(Body):
    id: ElementId
    type: Literal["physical", "loopback"]
    node: ElementId | None = None
    label: Label | None = None
    slot: Annotated[int, Field(ge=0, le=128)] | None = None
    mac_address: Mac | None = None


class TopologyNode(NodeBody):
    id: ElementId
    interfaces: list[TopologyInterface] = Field(default_factory=list)


class TopologyLink(Body):
    id: ElementId
    i1: ElementId
    i2: ElementId
    n1: ElementId
    n2: ElementId
    label: Label | None = None
    conditioning: ConditionBody | None = None


class TopologyLab(Body):
    version: Literal["0.0.1", "0.0.2", "0.0.3", "0.0.4", "0.0.5", "0.1.0", "0.2.0", "0.2.1", "0.2.2", "0.3.0"]
    title: Title | None = None
    description: Description = ""
    notes: Notes = ""


class SmartAnnotation(Body):
    tag: Annotated[str, Field(min_length=1, max_length=64)]
    is_on: bool = True
    padding: Annotated[int, Field(ge=1, le=200)] = 35
    label: Annotated[str, Field(max_length=256)] | None = None
    tag_offset_x: Annotated[int, Field(ge=-1000, le=1000)] = 0
    tag_offset_y: Annotated[int, Field(ge=-1000, le=1000)] = 0
    tag_size: Annotated[int, Field(ge=1, le=128)] = 14
    group_distance: Annotated[int, Field(ge=0, le=10_000)] = 400
    thickness: Annotated[int, Field(ge=1, le=32)] = 1
    border_style: Literal["", "2,2", "4,2"] | None = None
    fill_color: Annotated[str, Field(max_length=32)] | None = None
    border_color: Annotated[str, Field(max_length=32)] = "#00000080"
    z_index: Annotated[int, Field(ge=-10_240, le=10_240)] = 0


class Topology(Body):
    lab: TopologyLab
    nodes: list[TopologyNode]
    links: list[TopologyLink]
    annotations: list[dict[str, Scalar]] = Field(default_factory=list)
    smart_annotations: list[SmartAnnotation] = Field(default_factory=list)


class TopologyLab210(TopologyLab):
    version: Literal[  # type: ignore[assignment]  # one more than before
        "0.0.1", "0.0.2", "0.0.3", "0.0.4", "0.0.5", "0.1.0", "0.2.0", "0.2.1", "0.2.2", "0.3.0", "0.3.1"
    ]
    autostart: Autostart | None = None
    node_staging: NodeStaging | None = None


class TopologyNode210(TopologyNode):
    priority: Number | None = None
    pyats: dict[str, Scalar] | None = None


class Topology210(Topology):
    lab: TopologyLab210
    nodes: list[TopologyNode210]  # type: ignore[assignment]  # a list that only we read


class ProductLicense(RootModel[Annotated[str, Field(pattern=r"^\w{1,20}$")]]):
    """A bare JSON string."""

    model_config = ConfigDict(strict=True)


class Proxy(Body):
    server: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[a-zA-Z0-9.:\[\]%-]+$")] | None
    port: Annotated[int, Field(ge=1, le=65535)] | None


class Transport(Body):
    proxy: Proxy
    ssms: Annotated[str, Field(max_length=256, pattern=r"^https?://[^/\s]+(/[\w.-]+)+$")] | None = None


class Registration(Body):
    token: Annotated[str, Field(pattern=r"^[a-zA-Z0-9+/%=-]{1,256}$")]
    reregister: bool = False


class FeatureCount(Body):
    id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._,-]{1,128}$")]
    count: Annotated[int, Field(ge=0)]


class FeatureCounts(RootModel[Annotated[list[FeatureCount], Field(min_length=1)]]):
    """A bare list."""

    model_config = ConfigDict(strict=True)


class GroupBody(Body):
    name: Title
    description: Description = ""
    members: list[Id] = Field(default_factory=list)
    associations: list[Association] = Field(default_factory=list)


class GroupPatch(Body):
    name: Title | None = None
    description: Description | None = None
    members: list[Id] | None = None
    associations: list[Association] | None = None


class UserFields(Body):
    fullname: Text | None = None
    description: Description | None = None
    email: Text | None = None
    admin: bool | None = None
    groups: list[Id] | None = None
    associations: list[Association] | None = None
    resource_pool: Id | None = None
    opt_in: bool | None = None
    tour_version: Text | None = None
    pubkey: str | None = None


class UserBody(UserFields):
    username: Username
    password: str


class PasswordChange(Body):
    new_password: str
    old_password: str = ""


class UserPatch(UserFields):
    username: Username | None = None
    password: PasswordChange | None = None


class AdmissionState(Body):
    admission_state: Literal["UNREGISTERED", "REGISTERED", "ONLINE", "READY"]


class Maintenance(Body):
    maintenance_mode: bool | None = None
    notice: Id | None = None


class OptIn(Body):
    opt_in: bool | None
