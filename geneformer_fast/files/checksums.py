"""SHA-256 of files and tensors: what was written is what is read, and a run goes on with what it began with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.writing import is_plain_name, whole_file

if TYPE_CHECKING:
    import torch

#: Checksums of the files of a folder, as ``sha256sum -c SHA256SUMS`` reads them.
SUMS = "SHA256SUMS"
#: The environment variable that says whether what is read is compared with its checksums: ``0`` for no. It is the
#: default of every ``verify=`` and what ``--no-verify`` of the command line sets.
VERIFY = "GENEFORMER_FAST_VERIFY"
#: The field of a JSON file that holds the digest of its other fields.
DIGEST = "sha256"
_BLOCK = 1 << 20


def is_verifying(verify: bool | None = None) -> bool:
    """Whether checksums are compared: as asked, or where nobody asks as the environment says (:data:`VERIFY`)."""
    return os.environ.get(VERIFY, "1").lower() not in ("0", "no", "false", "off") if verify is None else bool(verify)


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Nothing is compared with its checksums meanwhile, in this process and those that it starts."""
    before = os.environ.get(VERIFY)
    os.environ[VERIFY] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VERIFY, None)
        else:
            os.environ[VERIFY] = before


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as hex; other threads run meanwhile."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_open(descriptor: int) -> str:
    """SHA-256 of an open file's content, as hex, wherever its position is; other threads run and read meanwhile."""
    digest, position = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, position):
        digest.update(block)
        position += len(block)
    return digest.hexdigest()


def fingerprint_of(content: Any) -> str:
    """SHA-256 over a JSON value's canonical form, as hex."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all that it says, which :func:`check_digest` compares."""
    plain = {key: value for key, value in content.items() if key != DIGEST}
    return {**plain, DIGEST: fingerprint_of(plain)}


def check_digest(content: Mapping[str, Any], path: Path, error: type[GeneformerFastError], advice: str) -> None:
    """Compare a JSON object with the digest in it; one without (older files) passes.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``, with ``advice``: it says something else than was written.
    """
    if DIGEST in content and is_verifying():
        plain = {key: value for key, value in content.items() if key != DIGEST}
        try:
            is_same = content[DIGEST] == fingerprint_of(plain)
        except RecursionError:  # parsed, but too deep to be written: nothing of ours
            is_same = False
        if not is_same:
            raise error(f"{path} is damaged or was changed: its content does not fit the digest in it; {advice}")


def sums_text(files: Mapping[str, str | os.PathLike[str]]) -> str:
    """The content of ``SHA256SUMS`` for files by name, wherever they lie for now."""
    return "".join(f"{sha256_of(files[name])}  {name}\n" for name in sorted(files))


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Put the checksums of some files of a folder into its ``SHA256SUMS``, in place of what it said before."""
    text = sums_text({name: folder / name for name in names})
    with whole_file(folder / SUMS) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_sums(folder: Path, error: type[GeneformerFastError]) -> dict[str, str]:
    """File name to SHA-256 from a folder's ``SHA256SUMS``; empty where there is none.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the file is no list of checksums.
    """
    path = folder / SUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path} cannot be read ({reason}); remove it to go without checksums") from None
    sums = {}
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():  # which sha256sum passes over too
            continue
        digest, mark, name = line[:64].lower(), line[64:66], line[66:].removeprefix("./")
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or mark not in ("  ", " *") or not name:
            raise error(f"{path} holds a line that is no checksum and file name; remove it to go without checksums")
        if is_plain_name(name):  # others list files of other folders too
            sums[name] = digest
    return sums


def check_file(path: Path, expected: str, error: type[GeneformerFastError], advice: str) -> None:
    """Compare a file with its checksum.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``, with ``advice``: the file changed after it was written.
    """
    found = sha256_of(path)
    if found != expected:
        raise error(damaged_message(path, found, expected, advice))


def damaged_message(path: Path, found: str, expected: str, advice: str) -> str:
    """What to say of a file whose checksum differs."""
    told = f"its SHA-256 is {found[:12]}..., and was {expected[:12]}... when it was written"
    return f"{path} is damaged or was changed: {told}; {advice}"


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever file they come from and in whatever order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(flat.data)
    return digest.hexdigest()
