"""What is on disk after a loss of power: the system calls of a run, on a disk that forgets.

As in ALICE (Pillai et al., "All file systems are not created equal", OSDI 2014), the calls that
change files are recorded and played back. A call is certain to be on disk only once an fsync of its
file, or of the folder whose names it changes, has returned that had begun after it; any subset of
the others may be, in any order. A rename within a folder is one change.
"""

import dataclasses
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What changes files, or would without `Disk` knowing how: that fails there.
_CALLS = (
    "open,openat,creat,lseek,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,"
    "fallocate,copy_file_range,sendfile,splice,mmap,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,"
    "renameat,renameat2,link,linkat,symlink,symlinkat,mknod,mknodat,dup,dup2,dup3,fsync,fdatasync"
)
_STRING, _DESCRIPTOR = r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?', r"(\w+)<((?:\\x[0-9a-f]{2})*)>(\(del)?"


def record(program, folder, *arguments):
    """Runs a program under strace; its calls that have to do with the folder.

    The test is skipped where there is no strace, or no process may be traced.
    """
    trace = folder.parent / "trace"
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", "16777216"]
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if (tried := subprocess.run([*command, "true"], capture_output=True, text=True)).returncode:
        pytest.skip(f"no process can be traced here: {tried.stderr.splitlines()[0]}")
    done = subprocess.run(
        [*command, "-o", trace, "-e", f"trace={_CALLS}", *program.command(*arguments)],
        cwd=folder,
        env=program.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return list(_read(trace, folder))


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call that did not fail.

    Attributes:
      name: of the call.
      arguments: as strace writes them.
      result: what it returned.
      began: how many of the calls before it in the list had returned when it began.
    """

    name: str
    arguments: str
    result: int
    began: int

    def strings(self):
        """The strings in the arguments: names, or content."""
        found = re.findall(_STRING, self.arguments)
        assert not any(cut for _, cut in found), "the record is cut short"
        return [_decoded(text) for text, _ in found]

    def descriptors(self):
        """Numbers and paths of the descriptors; no path where the file has no name any more."""
        found = re.findall(_DESCRIPTOR, self.arguments)
        return [
            (number, None if gone else os.fsdecode(_decoded(path))) for number, path, gone in found
        ]

    def syncs(self):
        """The path that is synced; None where this is no fsync."""
        return self.descriptors()[0][1] if self.name in ("fsync", "fdatasync") else None


def _read(trace, folder):
    """The calls in the order in which they returned."""
    here = "".join(f"\\x{byte:02x}" for byte in os.fsencode(folder))
    begun, number = {}, 0
    with open(trace) as lines:
        for line in lines:
            thread, text = line.split(maxsplit=1)
            if text.startswith("<..."):
                if thread not in begun:
                    continue
                before, began = begun.pop(thread)
                text = before + text.partition("resumed>")[2]
            elif here not in text:
                continue
            else:
                began = number
                if "<unfinished ...>" in text:
                    begun[thread] = text.partition("<unfinished ...>")[0], began
                    continue
            name, arguments, result = re.fullmatch(
                r"(\w+)\((.*)\) += (-?\d+|\?).*\n", text
            ).groups()
            if result.isdecimal():
                yield Call(name, arguments, int(result), began)
                number += 1


def _decoded(text):
    return bytes.fromhex(text.replace("\\x", ""))


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a file or of a folder.

    Attributes:
      kind: "set" and "move" and "remove" of a name in a folder; "write" and "cut" of a file.
      node: the folder or file, by whose fsync it is certain to be on disk.
      values: by kind: (name, node), (old name, new name, node), (name,), (place, content), (size,).
    """

    kind: str
    node: int
    values: tuple


class Disk:
    """The changes of a record, when each was certain, and what may be there at any moment.

    Args:
      calls: as `record` returns them.
      folder: empty, and on disk, when they began.
      mark: chooses further moments.
      forget: chooses paths whose fsync does nothing, as if it had been left out.

    Attributes:
      changes: in order.
      moments: (number of changes so far, numbers of those that are certain, the call that comes
        next) before each fsync returns and before each call that `mark` chooses, and after all.
    """

    def __init__(self, calls, folder, mark=lambda call: False, forget=lambda path: False):
        self.folder, self.changes, self.moments = str(folder), [], []
        self._folders, self._sizes, self._nodes = {0: {}}, {}, 1
        # By the number of a descriptor [node, place, whether it appends]. A close may be seen after
        # the open that takes its number again, so closes are not looked at.
        self._open = {}
        counts, certain = [0], set()
        for call in calls:
            if call.syncs() is not None or mark(call):
                self.moments.append((len(self.changes), frozenset(certain), call))
            if (path := call.syncs()) is None:
                self._apply(call)
            elif not forget(path):
                node = self._find(path)
                before = self.changes[: counts[call.began]]
                certain |= {i for i, change in enumerate(before) if change.node == node}
            counts.append(len(self.changes))
        self.moments.append((len(self.changes), frozenset(certain), None))

    def _inside(self, path):
        return path == self.folder or path.startswith(self.folder + "/")

    def _find(self, path):
        """The node of a path; None where there is none."""
        node = 0
        for name in Path(path).relative_to(self.folder).parts:
            node = self._folders[node].get(name) if node in self._folders else None
            if node is None:
                return None
        return node

    def _place(self, path):
        """The node of the folder of a path, and its name."""
        head, name = os.path.split(path)
        return self._find(head), name

    def _change(self, kind, node, *values):
        self.changes.append(Change(kind, node, values))

    def _apply(self, call):
        """Follows a call as a file system does that never fails."""
        name, descriptors = call.name, call.descriptors()
        if name in ("write", "writev", "pwrite64", "ftruncate", "lseek"):
            if descriptors[0][1] is None or descriptors[0][0] not in self._open:
                return  # a file without a name, or one that is only read
            return self._apply_to_descriptor(call, *descriptors[0])
        if name == "mmap" and ("MAP_SHARED" not in call.arguments or "WRITE" not in call.arguments):
            return
        paths = [os.fsdecode(string) for string in call.strings()]
        bases = [base for _, base in descriptors] or [self.folder] * len(paths)
        paths = [os.path.normpath(os.path.join(*pair)) for pair in zip(bases, paths, strict=False)]
        if not any(map(self._inside, paths)) and name != "mmap":
            return
        if name in ("open", "openat"):
            self._apply_open(call, *paths)
        elif name in ("mkdir", "mkdirat"):
            self._folders[node := self._new()] = {}
            self._set(*self._place(paths[0]), node)
        elif name in ("rename", "renameat", "renameat2") and "EXCHANGE" not in call.arguments:
            (folder, old), (other, new) = map(self._place, paths)
            assert folder == other, f"a rename between folders: {paths}"
            self._folders[folder][new] = node = self._folders[folder].pop(old)
            self._change("move", folder, old, new, node)
        elif name in ("unlink", "unlinkat", "rmdir"):
            folder, last = self._place(paths[0])
            del self._folders[folder][last]
            self._change("remove", folder, last)
        else:
            raise NotImplementedError(f"{name}({call.arguments})")

    def _new(self):
        self._nodes += 1
        return self._nodes - 1

    def _set(self, folder, name, node):
        self._folders[folder][name] = node
        self._change("set", folder, name, node)

    def _apply_open(self, call, path):
        self._open.pop(str(call.result), None)
        if "O_TMPFILE" in call.arguments or "O_DIRECTORY" in call.arguments:
            return
        if "O_WRONLY" not in call.arguments and "O_RDWR" not in call.arguments:
            return
        node = self._find(path)
        if node is None:
            self._sizes[node := self._new()] = 0
            self._set(*self._place(path), node)
        elif "O_TRUNC" in call.arguments:
            self._cut(node, 0)
        self._open[str(call.result)] = [node, 0, "O_APPEND" in call.arguments]

    def _cut(self, node, size):
        if self._sizes[node] != size:
            self._sizes[node] = size
            self._change("cut", node, size)

    def _apply_to_descriptor(self, call, number, path):
        node, place, append = self._open[number]
        assert node == self._find(path), f"descriptor {number} is of another file than {path}"
        if call.name == "lseek":
            self._open[number][1] = call.result
        elif call.name == "ftruncate":
            self._cut(node, int(call.arguments.rpartition(", ")[2]))
        else:
            if call.name == "pwrite64":
                place = int(call.arguments.rpartition(", ")[2])
            elif append:
                place = self._sizes[node]
            content = b"".join(call.strings())[: call.result]
            self._change("write", node, place, content)
            self._sizes[node] = max(self._sizes[node], place + len(content))
            if call.name != "pwrite64":
                self._open[number][1] = place + len(content)

    def after(self, chosen):
        """The files that are there when these changes are on disk, and no others.

        Args:
          chosen: in order, pairs of the number of a change and what of it: "all", or of a write
            "zeros" in its place or its first "half".

        Returns:
          Contents by path relative to the folder; None for a folder.
        """
        folders, contents = {0: {}}, {}
        for number, part in chosen:
            change = self.changes[number]
            node, values = change.node, change.values
            if change.kind == "write":
                place, content = values
                if part == "half":
                    content = content[: len(content) // 2]
                elif part == "zeros":
                    content = bytes(len(content))
                file = contents.setdefault(node, bytearray())
                file.extend(bytes(max(0, place - len(file))))
                file[place : place + len(content)] = content
            elif change.kind == "cut":
                file = contents.setdefault(node, bytearray())
                file.extend(bytes(max(0, values[0] - len(file))))
                del file[values[0] :]
            else:
                names = folders.setdefault(node, {})
                names.pop(values[0], None)
                if change.kind != "remove":
                    names[values[-2]] = values[-1]
        return dict(self._walk(folders, contents, 0, ""))

    def _walk(self, folders, contents, node, path):
        for name, inner in folders.get(node, {}).items():
            if inner in self._folders:
                yield path + name, None
                yield from self._walk(folders, contents, inner, f"{path}{name}/")
            else:
                yield path + name, bytes(contents.get(inner, b""))

    def everything(self, number):
        """The files after so many changes when none is lost."""
        return self.after([(i, "all") for i in range(number)])

    def losses(self, moment, generator, subsets):
        """What may be there when the power goes at a moment: always the extremes, then at random.

        Args:
          moment: one of `moments`.
          generator: a `random.Random`.
          subsets: how many random ones.
        """
        number, certain, _ = moment
        data = [self.changes[i].kind in ("write", "cut") for i in range(number)]

        def state(choose):
            parts = ("all" if i in certain else choose(i) for i in range(number))
            return self.after([(i, part) for i, part in enumerate(parts) if part])

        yield state(lambda i: None)
        yield state(lambda i: "all")
        yield state(lambda i: None if data[i] else "all")
        yield state(lambda i: "zeros" if data[i] else "all")
        yield state(lambda i: "all" if data[i] else None)
        uncertain = [i for i in range(number) if i not in certain]
        for k in range(subsets if uncertain else 0):
            if k % 3 == 0:  # all but one
                lost = generator.choice(uncertain)
                yield state(lambda i, lost=lost: None if i == lost else "all")
            else:
                share = generator.choice((0.1, 0.5, 0.9))
                kept = {i for i in uncertain if generator.random() < share}
                parts = {i: generator.choice(("all", "all", "zeros", "half")) for i in kept}
                yield state(
                    lambda i, parts=parts: parts.get(i) if data[i] else parts.get(i) and "all"
                )


def build(state, folder):
    """Makes the files of a state, as `Disk.after` returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def found(folder):
    """The files in a folder, as `Disk.after` returns them."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def seeded():
    """The generator of all random choices."""
    return random.Random(0)
