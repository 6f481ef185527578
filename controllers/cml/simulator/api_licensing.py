"""The licensing endpoints: for administrators only."""

from __future__ import annotations

from controllers.cml.simulator.bodies import FeatureCounts, ProductLicense, Registration, Transport
from controllers.cml.simulator.licensing import PRODUCTS, NotPossibleNowError, NotRegisteredError
from controllers.cml.simulator.machine import identity
from controllers.cml.simulator.routing import Call, RefusalError, Reply, Route, done, ok


def status(call: Call) -> Reply:
    machine = call.machine
    document = machine.licensing.document()
    other = machine.faults.find("identity", machine.name)
    if other:
        document["udi"]["product_uuid"] = other.product_uuid or identity(machine.name, "someone else")
    return ok(document)


def features(call: Call) -> Reply:
    machine = call.machine
    return ok(machine.licensing.document()["features"])


def product_license(call: Call) -> Reply:
    product = call.body(ProductLicense).root
    if product not in PRODUCTS:
        raise RefusalError(400, f"Product license {product} is not one of {', '.join(PRODUCTS)}.")
    call.machine.licensing.product = product
    return done()


def transport(call: Call) -> Reply:
    given = call.body(Transport)
    licensing = call.machine.licensing
    licensing.ssms, licensing.proxy_server, licensing.proxy_port = given.ssms, given.proxy.server, given.proxy.port
    return done()


def register(call: Call) -> Reply:
    given = call.body(Registration)
    clock = call.machine.clock
    try:
        call.machine.licensing.register(given.token, clock.monotonic(), clock.now(), again=given.reregister)
    except NotPossibleNowError as e:
        raise RefusalError(409, str(e)) from None
    call.machine.record("license_info", {"status": "IN_PROGRESS"})
    return done()


def deregister(call: Call) -> Reply:
    try:
        told = call.machine.licensing.deregister()
    except NotRegisteredError:
        return Reply(400)
    except NotPossibleNowError as e:
        raise RefusalError(409, str(e)) from None
    call.machine.record("license_info", {"status": "NOT_REGISTERED"})
    return Reply(204 if told else 202)


def renew(call: Call) -> Reply:
    try:
        call.machine.licensing.renew(call.machine.clock.now())
    except NotRegisteredError:
        raise RefusalError(400, "The product is not registered.") from None
    except NotPossibleNowError as e:
        raise RefusalError(409, str(e)) from None
    return done()


def count_features(call: Call) -> Reply:
    known = {f["id"] for f in call.machine.licensing.document()["features"]}
    unknown = [f.id for f in call.body(FeatureCounts).root if f.id not in known]
    if unknown:
        raise RefusalError(400, f"Unknown features: {', '.join(unknown)}.")
    return done()


ROUTES = (
    Route("GET", "/licensing", status, "admin"),
    Route("GET", "/licensing/features", features, "admin"),
    Route("PATCH", "/licensing/features", count_features, "admin"),
    Route("PUT", "/licensing/product_license", product_license, "admin"),
    Route("PUT", "/licensing/transport", transport, "admin"),
    Route("POST", "/licensing/registration", register, "admin"),
    Route("PUT", "/licensing/registration/renew", renew, "admin"),
    Route("PUT", "/licensing/authorization/renew", renew, "admin"),
    Route("DELETE", "/licensing/deregistration", deregister, "admin"),
)
