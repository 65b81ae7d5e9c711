"""One conversion's files on disk: its partial outputs and journal, begun afresh or taken up again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from streamquant import errors
from streamquant.checkpoint.calls import remove, sync_folder, writing
from streamquant.checkpoint.header import printable
from streamquant.checkpoint.journal import Journal, Records, differences, in_use, read_records
from streamquant.checkpoint.positioned import opened
from streamquant.checkpoint.writer import Names, PartialFile, find_journals
from streamquant.output_file import HASH_DIGITS
from streamquant.plan import Plan, Unit
from streamquant.preflight import check_destination, check_disk

CHUNK = 8 << 20


@dataclass
class Session:
    """The state a conversion works on.

    done: unit -> its last journal record ("hashes", "sums"). begun: the unit in hand when the run broke off, if its first
    tiles are intact. learned: unit -> result of its first pass. published: numbers of files that have their final names.
    syncs_names: whether the filesystem can make names durable.
    """

    plan: Plan
    names: Names
    journal: Journal
    files: list[PartialFile]
    resumed: bool = False
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    begun: dict[int, dict[str, Any]] = field(default_factory=dict)
    learned: dict[int, Any] = field(default_factory=dict)
    published: set[int] = field(default_factory=set)
    syncs_names: bool = True

    def abandon(self) -> None:
        """Close everything on the way out of a failure, which is the one to be told. What was written is kept."""
        for file in self.files:
            file.abandon()
        self.journal.abandon()

    def discard(self) -> None:
        """Remove the partial files, the shards published so far and the journal: there is nothing in them to go on from.

        This too is the way out of a failure; what cannot be removed stays, and its journal with it.
        """
        self.abandon()
        with contextlib.suppress(errors.DestinationWriteError):
            for number, file in enumerate(self.files):
                remove(file.partial)
                if number in self.published:
                    remove(file.final)
            remove(self.names.journal)

    def finish(self) -> None:
        """All files are published: the journal has served."""
        for file in self.files:
            file.close()
        self.journal.close()
        with writing(self.names.destination):
            sync_folder(self.names.destination.parent)  # no partial name must outlive the journal that leads to it
        remove(self.names.journal)

    @functools.cached_property
    def members(self) -> list[list[Unit]]:
        """The units of each output file, in order."""
        members: list[list[Unit]] = [[] for _ in self.files]
        for unit in self.plan.units:
            members[self.plan.file_of(unit)].append(unit)
        return members

    def file_hashes(self, number: int) -> bytes:
        """The hex digits that go into file `number`'s header: one hash per tensor, in file order."""
        hashes = {}
        for unit in self.members[number]:
            hashes.update(zip(unit.output_names, self.done[unit.index]["hashes"], strict=True))
        return "".join(hashes[tensor.name] for tensor in self.plan.files[number].tensors).encode()

    def publish(self, number: int, replace: bool) -> bool:
        """File `number` is complete: put its hashes in place, make it durable, give it its name.

        Returns whether the filesystem can give a name without ever replacing another file.
        """
        self.files[number].write(self.plan.files[number].hash_offset, memoryview(self.file_hashes(number)))
        # A resume knows a file that has its final name by the hashes in the journal: they must not be lost after it.
        self.journal.sync()
        never_replaces = self.files[number].publish(replace)
        self.published.add(number)
        self.journal.append({"published": number})
        return never_replaces


def open_session(
    plan: Plan, destination: Path, fingerprint: dict[str, Any], *, resume: bool, force: bool, note: Callable[[str], None]
) -> Session | None:
    """Begin a conversion, or go on with an interrupted one. None: `resume`, and the output is complete already.

    Raises a PreflightError when the destination cannot be written, ResumeError when the only partial output there
    belongs to another conversion.
    """
    with writing(destination):
        journals = find_journals(destination)
        if resume:
            session, complaint = _take_up(plan, journals, fingerprint, force)
            if session:
                note("Resuming: what the interrupted run wrote is intact up to where it goes on.")
                return _noted(session, note)
            if is_complete(plan, destination):
                return None
            if complaint:
                raise complaint
            note("There is nothing to resume: starting from the beginning.")
        check_destination(plan, destination, force)
        _refuse_company(journals)
        if journals and not resume:
            note(
                f"An interrupted conversion to this name is still here ({printable(journals[0].journal.name)}): "
                f"--resume goes on with it; delete it with its .partial file if it is not wanted."
            )
        check_disk(plan, destination.parent)
        return _noted(_begin(plan, destination, fingerprint), note)


def _refuse_company(journals: list[Names]) -> None:
    """Raise PreflightError when one of these runs is alive: two at once would be in each other's way."""
    for names in journals:
        if in_use(names.journal):
            raise errors.PreflightError(
                f"Another conversion to {printable(str(names.destination), 300)} is running: wait for it, stop it, or give "
                f"another name with -o."
            )


def _noted(session: Session, note: Callable[[str], None]) -> Session:
    """The session, once it is said what its filesystem cannot do."""
    if not all(file.preallocated for file in session.files) and not session.resumed:
        note("This filesystem cannot reserve space: a full disk will show only when it is full (and --resume goes on).")
    if not session.syncs_names and os.name == "posix":
        note("This filesystem cannot make names durable: after a power cut the finished file may be missing.")
    if not session.journal.locked:
        note("This filesystem has no locks: see to it that no other conversion writes to the same name meanwhile.")
    return session


def _begin(plan: Plan, destination: Path, fingerprint: dict[str, Any]) -> Session:
    names = Names.fresh(destination)
    files = [PartialFile(names.partial(file.name), names.final(file.name), file.size) for file in plan.files]
    session = Session(plan, names, Journal.create(names.journal, fingerprint), files)
    try:
        # Looked for once more: of two that begin together, at least one now sees the other.
        _refuse_company([other for other in find_journals(destination) if other != names])
        _create_files(session)
    except BaseException:
        session.discard()
        raise
    return session


def _create_files(session: Session) -> None:
    """Make the partial files. The journal's name is made safe before theirs: nothing else would lead to them."""
    folder = session.names.destination.parent
    with writing(session.names.journal):
        session.syncs_names = sync_folder(folder)
    for planned, file in zip(session.plan.files, session.files, strict=True):
        remove(file.partial)
        file.create(planned.header)
    with writing(session.names.destination):
        sync_folder(folder)


def _take_up(
    plan: Plan, journals: list[Names], fingerprint: dict[str, Any], force: bool
) -> tuple[Session | None, errors.ResumeError | None]:
    """The newest interrupted run with this fingerprint, checked; where there is none, why the newest other one is not it."""
    complaint: errors.ResumeError | None = None
    for names in journals:
        try:
            found = read_records(names.journal).fingerprint
        except errors.ResumeError as error:
            # Killed before its first line was whole, a run has made no partial file: there is nothing to complain of.
            if any(names.partial(file.name).exists() for file in plan.files):
                complaint = complaint or error
            continue
        if changes := differences(found, fingerprint):
            complaint = complaint or errors.ResumeError(
                f"The interrupted conversion in {printable(names.journal.name)} is not this one: {'; '.join(changes[:6])}. "
                f"Use the same source and recipe, or delete it and convert from the start."
            )
            continue
        journal, records = Journal.reopen(names.journal)
        files = [PartialFile(names.partial(file.name), names.final(file.name), file.size) for file in plan.files]
        session = Session(plan, names, journal, files, resumed=True, learned=records.learned)
        try:
            _refuse_company([other for other in journals if other != names])
            _restore(session, records, force)
        except BaseException:
            session.abandon()
            raise
        return session, None
    return None, complaint


def _restore(session: Session, records: Records, force: bool) -> None:
    """Open the files as the interrupted run left them, and take over what the journal says of them."""
    if not (records.units or records.learned or records.published):
        # Killed while it was making its files: what there is of them holds nothing yet.
        check_destination(session.plan, session.names.destination, force)
        _create_files(session)
        return
    for number, (planned, file) in enumerate(zip(session.plan.files, session.files, strict=True)):
        if number in records.published or _has_final_name(file):
            _expect_published(session, number, records)
        elif not file.partial.exists():
            raise errors.ResumeError(
                f"The partial file {printable(str(file.partial), 300)} is gone: delete {printable(session.names.journal.name)} "
                f"and convert from the start."
            )
        else:
            file.reopen(planned.header)
    if not session.published:
        check_destination(session.plan, session.names.destination, force)
    _check_claims(session, records)


def _has_final_name(file: PartialFile) -> bool:
    """Whether the run broke off after it had given a file its final name, or in the middle: it had both names then."""
    if not file.final.exists():
        return False
    return not file.partial.exists() or file.partial.samefile(file.final)


def _expect_published(session: Session, number: int, records: Records) -> None:
    """A file was given its final name just before the run broke off; make sure that it is ours."""
    planned, final = session.plan.files[number], session.files[number].final
    members = {unit.index for unit in session.members[number]}
    ours = final.exists() and final.stat().st_size == planned.size and members <= records.units.keys()
    if ours:
        session.done |= {index: records.units[index] for index in members if "hashes" in records.units[index]}
        ours = members <= session.done.keys()
    if ours:
        expected = bytearray(planned.header)
        hashes = session.file_hashes(number)
        expected[planned.hash_offset : planned.hash_offset + len(hashes)] = hashes
        with opened(final) as file:
            ours = file.read(len(expected)) == bytes(expected)
    if not ours:
        raise errors.ResumeError(
            f"{printable(str(final), 300)} is not what the interrupted run wrote: delete "
            f"{printable(session.names.journal.name)} and convert from the start."
        )
    with writing(final):
        sync_folder(final.parent)
    remove(session.files[number].partial)
    session.published.add(number)


def _check_claims(session: Session, records: Records) -> None:
    """Take from the journal what the partial files bear out: all units up to the first that is missing or damaged."""
    for unit in session.plan.units:
        if unit.index in session.done:
            continue
        record = records.units.get(unit.index)
        if record is None:
            return
        if "hashes" in record:
            if unit.index not in records.durable and _hashes(session, unit, None) != record["hashes"]:
                return
            session.done[unit.index] = record
        else:
            if _hashes(session, unit, record["end"]) == record["digests"]:
                session.begun[unit.index] = record
            return


def _hashes(session: Session, unit: Unit, end: int | None) -> list[str]:
    """xxh3_64 of each output as it lies in the partial file: whole, or (streamed ones only) up to element `end`."""
    outputs = [output for output in unit.outputs if end is None or output.streamed]
    return [hasher.hexdigest() for hasher in prefix_hashers(session, unit, outputs, end)]


def prefix_hashers(session: Session, unit: Unit, outputs: list, end: int | None) -> Iterator[xxhash.xxh3_64]:
    """A running hash per output, fed with what the partial file holds of it so far."""
    for output in outputs:
        number, offset, nbytes = session.plan.placement[unit.output_name(output)]
        length = nbytes if end is None else output.extent(0, end)[1]
        hasher = xxhash.xxh3_64()
        for begin in range(0, length, CHUNK):
            hasher.update(session.files[number].read(offset + begin, min(CHUNK, length - begin)))
        yield hasher


def is_complete(plan: Plan, destination: Path) -> bool:
    """Whether the planned output exists already, complete: same size, the same header but for the hashes, no older than
    the source (whose weights may have changed under the same header).
    """
    newest = max(file.mtime_ns for file in plan.checkpoint.files)
    for planned in plan.files:
        final = destination.parent / planned.name
        if not final.is_file() or final.stat().st_size != planned.size or final.stat().st_mtime_ns < newest:
            return False
        with opened(final) as file:
            header = bytearray(file.read(len(planned.header)))
        digits = HASH_DIGITS * len(planned.tensors)
        header[planned.hash_offset : planned.hash_offset + digits] = b"0" * digits
        if bytes(header) != planned.header:
            return False
    return plan.index_name is None or destination.with_name(plan.index_name).is_file()
