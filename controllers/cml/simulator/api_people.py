"""Users and groups."""

from __future__ import annotations

from uuid import uuid4

from controllers.cml.simulator.accounts import Group, User
from controllers.cml.simulator.bodies import Association, GroupBody, GroupPatch, UserBody, UserFields, UserPatch
from controllers.cml.simulator.routing import Call, RefusalError, Reply, Route, done, ok
from controllers.cml.simulator.views import group_document, old_groups, user_document


def users(call: Call) -> Reply:
    return ok([user_document(call.machine, u) for u in call.machine.directory.users.values()])


def create_user(call: Call) -> Reply:
    call.require_admin()
    given = call.body(UserBody)
    directory = call.machine.directory
    if directory.named(given.username):
        raise RefusalError(400, f"User {given.username} exists already.")
    _check_groups(call, given)
    user = directory.add(given.username, given.password, call.machine.clock.now(), admin=bool(given.admin))
    _write_user(call, user, given)
    return ok(user_document(call.machine, user), 201)


def user(call: Call) -> Reply:
    return ok(user_document(call.machine, _user(call)))


def change_user(call: Call) -> Reply:
    found = _user(call)
    if found is not call.user:
        call.require_admin()
    given = call.body(UserPatch)
    if (given.admin is not None and given.admin != found.admin) or given.groups is not None:
        call.require_admin()
    _check_groups(call, given)
    named = call.machine.directory.named(given.username) if given.username else None
    if named is not None and named is not found:
        raise RefusalError(400, f"User {given.username} exists already.")
    if given.password is not None:
        if not call.admin and given.password.old_password != found.password:
            raise RefusalError(403, "The old password is wrong.")
        found.password = given.password.new_password
    found.username = given.username or found.username
    _write_user(call, found, given)
    return ok(user_document(call.machine, found))


def delete_user(call: Call) -> Reply:
    call.require_admin()
    found = _user(call)
    if found is call.user:
        raise RefusalError(400, "A user cannot remove itself.")
    for lab in call.machine.labs.values():
        lab.associations["users"].pop(found.id, None)
        if lab.owner == found.id:
            lab.owner = call.user.id
            lab.version += 1
    call.machine.directory.remove_user(found)
    return done()


def user_groups(call: Call) -> Reply:
    return ok(_user(call).groups)


def user_id(call: Call) -> Reply:
    found = call.machine.directory.named(call.params["username"])
    if found is None:
        raise RefusalError(404, f"User not found: {call.params['username']}")
    return ok(found.id)


def groups(call: Call) -> Reply:
    own = set(call.user.groups)
    return ok(
        [group_document(call.machine, g) for g in call.machine.directory.groups.values() if call.admin or g.id in own]
    )


def create_group(call: Call) -> Reply:
    call.require_admin()
    given = call.body(GroupBody)
    if any(g.name == given.name for g in call.machine.directory.groups.values()):
        raise RefusalError(400, f"Group {given.name} exists already.")
    _check_members(call, given.members)
    _check_labs(call, given.associations)
    when = call.machine.clock.now()
    group = Group(str(uuid4()), given.name, when, when, given.description)
    call.machine.directory.groups[group.id] = group
    _set_members(call, group, given.members)
    _set_labs(call, group, given.associations)
    return ok(group_document(call.machine, group), 201)


def group(call: Call) -> Reply:
    return ok(group_document(call.machine, _group(call)))


def change_group(call: Call) -> Reply:
    call.require_admin()
    found = _group(call)
    given = call.body(GroupPatch)
    _check_members(call, given.members or [])
    _check_labs(call, given.associations or [])
    found.name = given.name or found.name
    found.description = found.description if given.description is None else given.description
    if given.members is not None:
        _set_members(call, found, given.members)
    if given.associations is not None:
        _set_labs(call, found, given.associations)
    found.modified = call.machine.clock.now()
    return ok(group_document(call.machine, found))


def delete_group(call: Call) -> Reply:
    call.require_admin()
    found = _group(call)
    _set_members(call, found, [])
    _set_labs(call, found, [])
    del call.machine.directory.groups[found.id]
    return done()


def group_labs(call: Call) -> Reply:
    found = _group(call)
    return ok([lab.id for lab in call.machine.labs.values() if any(g["id"] == found.id for g in old_groups(lab))])


def group_members(call: Call) -> Reply:
    return ok(_group(call).members)


def group_id(call: Call) -> Reply:
    name = call.params["group_name"]
    for found in call.machine.directory.groups.values():
        if found.name == name:
            return ok(found.id)
    raise RefusalError(404, f"Group not found: {name}")


def _user(call: Call) -> User:
    found = call.machine.directory.users.get(call.params["user_id"])
    if found is None:
        raise RefusalError(404, f"User not found: {call.params['user_id']}")
    return found


def _group(call: Call) -> Group:
    found = call.machine.directory.groups.get(call.params["group_id"])
    if found is None:
        raise RefusalError(404, f"Group not found: {call.params['group_id']}")
    return found


def _write_user(call: Call, user: User, given: UserFields) -> None:
    for name in ("fullname", "description", "email", "admin", "opt_in", "tour_version"):
        value = getattr(given, name)
        if value is not None:
            setattr(user, name, value)
    if given.groups is not None:
        for found in call.machine.directory.groups.values():
            members = set(found.members)
            if (found.id in given.groups) != (user.id in members):
                _set_members(call, found, [*members ^ {user.id}])
    user.modified = call.machine.clock.now()


def _check_groups(call: Call, given: UserFields) -> None:
    missing = [g for g in given.groups or () if g not in call.machine.directory.groups]
    if missing:
        raise RefusalError(400, f"Group not found: {', '.join(missing)}")


def _check_members(call: Call, members: list[str]) -> None:
    missing = [m for m in members if m not in call.machine.directory.users]
    if missing:
        raise RefusalError(400, f"User not found: {', '.join(missing)}")


def _check_labs(call: Call, associations: list[Association]) -> None:
    missing = [a.id for a in associations if a.id not in call.machine.labs]
    if missing:
        raise RefusalError(400, f"Lab not found: {', '.join(missing)}")


def _set_members(call: Call, group: Group, members: list[str]) -> None:
    group.members = list(dict.fromkeys(members))
    for user in call.machine.directory.users.values():
        if (user.id in group.members) != (group.id in user.groups):
            user.groups = [g for g in user.groups if g != group.id] + ([group.id] if user.id in group.members else [])


def _set_labs(call: Call, group: Group, associations: list[Association]) -> None:
    wanted: dict[str, list[str]] = {a.id: [*a.permissions] for a in associations if a.permissions}
    for lab in call.machine.labs.values():
        held = lab.associations["groups"]
        if held.get(group.id) != wanted.get(lab.id):
            held.pop(group.id, None)
            if lab.id in wanted:
                held[group.id] = wanted[lab.id]
            lab.version += 1


ROUTES = (
    Route("GET", "/users", users),
    Route("POST", "/users", create_user),
    Route("GET", "/users/{user_id}", user),
    Route("PATCH", "/users/{user_id}", change_user),
    Route("DELETE", "/users/{user_id}", delete_user),
    Route("GET", "/users/{user_id}/groups", user_groups),
    Route("GET", "/users/{username}/id", user_id),
    Route("GET", "/groups", groups),
    Route("POST", "/groups", create_group),
    Route("GET", "/groups/{group_id}", group),
    Route("PATCH", "/groups/{group_id}", change_group),
    Route("DELETE", "/groups/{group_id}", delete_group),
    Route("GET", "/groups/{group_id}/labs", group_labs),
    Route("GET", "/groups/{group_id}/members", group_members),
    Route("GET", "/groups/{group_name}/id", group_id),
)
