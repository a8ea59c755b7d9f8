"""Boxes of tensor maps, and the mbarriers at which they are waited for."""

from __future__ import annotations

from simulator.parser import Address, Immediate, Operand, Symbol
from simulator.translator import Code, form


@form("cp.async.bulk.tensor.{1,2,3,4,5}d.shared::{cluster,cta}.global{,.tile}.mbarrier::complete_tx::bytes")
def load_box(c: Code, _: str, __: str, ___: str) -> None:
    which, coordinates = _box(c, c.operands[1])
    barrier = c.address(2, "b32")
    c.emit(f"m.boxes.load(m, {c.line}, {c.address(0, 'b32')}, {which}, {coordinates}, {barrier}, {c.guard})")


@form("cp.async.bulk.tensor.{1,2,3,4,5}d.global.shared::cta{,.tile}.bulk_group")
def store_box(c: Code, _: str, __: str) -> None:
    which, coordinates = _box(c, c.operands[0])
    c.emit(f"m.stores.store(m, {c.line}, {c.address(1, 'b32')}, {which}, {coordinates}, {c.guard})")


def _box(c: Code, operand: Operand) -> tuple[str, str]:
    if not isinstance(operand, Address) or not operand.coordinates:
        raise c.unsupported(f"operand {operand}")
    return c.read(operand.base, "b64"), f"({''.join(c.read(i, 'b32') + ', ' for i in operand.coordinates)})"


@form("cp.async.bulk.commit_group")
def commit(c: Code) -> None:
    c.emit("m.stores.commit()")


@form("cp.async.bulk.wait_group{,.read}")
def wait(c: Code, _: str) -> None:
    c.emit(f"m.stores.wait(m, {c.integer(0)})")


@form("mbarrier.init{,.shared,.shared::cta}.b64")
def initialise(c: Code, _: str) -> None:
    c.translation.accesses(8)
    c.emit(f"m.barriers.initialise(m, {c.line}, {c.address(0, 'b32')}, {c.integer(1)}, {c.guard})")


@form("mbarrier.inval{,.shared,.shared::cta}.b64")
def invalidate(c: Code, _: str) -> None:
    c.emit(f"m.barriers.invalidate(m, {c.line}, {c.address(0, 'b32')}, {c.guard})")


@form("mbarrier.arrive{.expect_tx,}{,.shared,.shared::cta}.b64")
def arrive(c: Code, expects: str, _: str) -> None:
    if c.operands[0] != Symbol("_"):
        raise c.unsupported("a state")
    if expects:
        count, expected = 1, c.integer(2)
    else:
        count, expected = (c.integer(2) if len(c.operands) > 2 and isinstance(c.operands[2], Immediate) else 1), 0
    c.emit(f"m.barriers.arrive(m, {c.line}, {c.address(1, 'b32')}, {count}, {expected}, {c.guard})")


@form("mbarrier.try_wait.parity{,.shared,.shared::cta}.b64")
def try_wait(c: Code, _: str) -> None:
    c.write(0, f"m.barriers.wait(m, {c.line}, {c.address(1, 'b32')}, {c.read(2, 'u32')})", "pred")
