"""Rules on `image`: what it names, whether that can change, and whether it fits."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from apertus_nemo.edf.described import contradictions, described
from apertus_nemo.edf.finding import ERROR, NOTE, WARNING, Finding, short
from apertus_nemo.edf.rules import Case, at
from apertus_nemo.errors import InputError

SUFFIXES = (".sqsh", ".sqfs", ".squashfs", ".squash")
_CONTENT = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,64}(?![0-9a-f])")
_DIGEST = re.compile(r"@(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")
_REFERENCE = re.compile(
    r"(?:[A-Za-z0-9._-]+@)?(?:[A-Za-z0-9.-]+(?::\d+)?#)?[A-Za-z0-9.-]+(?::\d+(?=/))?(?:/[A-Za-z0-9._-]+)*(?::[A-Za-z0-9._-]+)?(?:@.*)?"
)
PLACEHOLDER = re.compile(
    r"<[A-Za-z][\w /.-]*>|(?<!\$)\{[A-Za-z_]\w*\}|(?<![A-Za-z0-9])YOUR[_-][A-Z]\w*|(?<=/)your[_-](?:user)?name(?![\w-])"
)
_ARCHITECTURES = {"aarch64": r"aarch64|arm64|gh200", "x86_64": r"x86_64|x86-64|amd64|x86"}
# Names that tell the C library. glibc of Ubuntu 20.04: 2.31, 22.04: 2.35, Debian 12: 2.36, RHEL 8: 2.28, 9: 2.34.
_OLD_GLIBC = re.compile(
    r"ubuntu[:_-]?(?:18\.04|20\.04|22\.04)|focal|jammy|bionic|bullseye|bookworm|debian[:_-]?1[012]\b|"
    r"(?:ubi|rocky(?:linux)?|almalinux|rhel|centos|el)[:_/-]?[789](?!\d)",
    re.IGNORECASE,
)
_NGC_PYTORCH = re.compile(r"nvcr\.io[#/]nvidia/pytorch:(\d\d)\.(\d\d)")
_CUDA = re.compile(r"cuda[_:-]?(1[0-9])(?![0-9])|cuda[_:-]?(1[0-9])\.\d", re.IGNORECASE)


def check_image(case: Case) -> Iterator[Finding]:
    """All rules of this file."""
    value = case.merged.single.get("image")
    image = case.merged.text("image")
    if value is None or image is None:
        return
    origin = value.origin

    if match := PLACEHOLDER.search(image):
        what, why = f"{short(match[0])} in image was not replaced", "no engine replaces it"
        yield at(origin, ERROR, "placeholder", what, why, "write the real name; variables are written ${NAME}")
        return
    done = case.expanded(image)
    text = image if done.missing or not case.dialect.expands_image else done.text
    path = text.startswith(("/", "./", "../")) or (text.startswith("${") and text.lower().endswith(SUFFIXES))
    if done.names and not case.dialect.expands_image:
        why = "Sarus Suite does not expand variables in image"
        yield at(origin, ERROR, "variable-in-image", f"a variable in image {short(image)!r}", why, "write the name out")
        if not path:
            return
    yield from _family(case, image)
    if path:
        if not case.dialect.sqsh_image:
            why = "Sarus Suite starts images from its store, not from files"
            do = "push it to a registry and name it"
            yield at(origin, ERROR, "image-format", f"image is a path: {short(image)}", why, do)
            return
        yield from _file(case, text, complete=not done.missing)
    elif text.lower().endswith(SUFFIXES) and "@" not in text:
        why = "a path starts with / or ./: this is taken for a name on Docker Hub"
        yield at(origin, ERROR, "image-format", f"image {short(image)!r} is no path", why, "write the absolute path")
    elif not done.missing:  # else the rules on variables say so
        yield from _reference(case, text)


def _reference(case: Case, image: str) -> Iterator[Finding]:
    origin = case.merged.single["image"].origin
    if re.match(r"(?:docker|oras|library|https?|podman|dockerd)://", image):
        scheme = image.split("://")[0]
        why = "image is [USER@][REGISTRY#]IMAGE[:TAG], without a scheme"
        yield at(origin, ERROR, "image-format", f"{scheme}:// in image", why, "remove it")
        return
    if "@" in image and re.search(r"@sha(?:256|512):?", image):
        if not _DIGEST.search(image):
            why = "a digest is sha256: and 64 hexadecimal digits, in small letters"
            yield at(origin, ERROR, "image-digest", f"no digest at the end of {short(image)}", why, "copy all of it")
        elif not case.sarus:
            why = "the reference of the Container Engine lists only [:TAG]; Enroot 4 reads digests, older ones do not"
            do = "safer: import it once, and name the .sqsh file by its content"
            yield at(origin, NOTE, "image-digest", "image by digest", why, do)
        return
    if not _REFERENCE.fullmatch(image):
        why = "it must be [USER@][REGISTRY#]IMAGE[:TAG], or the path of a SquashFS file"
        yield at(origin, ERROR, "image-format", f"image {short(image)!r} is no reference", why, "correct it")
        return
    tag = image.rpartition("/")[2].rpartition("#")[2].partition(":")[2]
    pin = "pin the content: a .sqsh file named by its hash" + (", or NAME@sha256:..." if case.sarus else "")
    if not tag or re.match(r"latest\b", tag):
        what = (
            f"image {short(image)} is whatever is newest"
            if tag
            else f"image {short(image)} has no tag: it means latest"
        )
        why = "and a copy in the cache is kept when the registry has a newer one, so two users can get two images"
        yield at(origin, WARNING, "image-latest", what, why, pin)
    else:
        why = "a tag can be moved, and a copy in the cache is not refreshed: two users can get two images"
        yield at(origin, WARNING, "image-tag", f"image by tag only: {short(image)}", why, pin)


def _file(case: Case, path: str, *, complete: bool) -> Iterator[Finding]:
    origin = case.merged.single["image"].origin
    name = path.rpartition("/")[2]
    if path.startswith("."):
        why = "it starts in the folder in which srun is called, not at this file"
        yield at(origin, WARNING, "relative-to-caller", "image is a relative path", why, "write the absolute path")
    if not _CONTENT.search(name):
        why = "whoever writes to this path changes the run, and no record says which image it was"
        do = "name the file by its content, as `apertus-nemo image pull` does, and never overwrite it"
        yield at(
            origin, WARNING, "image-path", f"nothing in the name {short(name)!r} says what is in the file", why, do
        )
    if complete and path.startswith("/"):
        yield from _on_disk(case, Path(path))


def _on_disk(case: Case, path: Path) -> Iterator[Finding]:
    """What can be seen from this machine; nothing where it does not have the file system."""
    origin = case.merged.single["image"].origin
    shown = short(path, 300)
    try:
        if not Path("/", *path.parts[1:2]).is_dir():
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        what = f"there is no {shown}"
        if path.parent.is_dir():
            why = "files on scratch are removed when nobody reads them for some weeks"
            yield at(origin, ERROR, "image-file", what, why, "import the image again, or correct the path")
        else:
            why = "its folder is not on this machine either"
            yield at(origin, WARNING, "image-file", what, why, "correct the path, unless this is another machine")
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        yield at(origin, ERROR, "image-file", f"{shown} cannot be read", why, "ask its owner for chmod a+r")
        return
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            why = "an image is a regular file"
            yield at(origin, ERROR, "image-file", f"{shown} is no file", why, "name the SquashFS file")
        elif os.read(descriptor, 4) != b"hsqs":
            why = "a SquashFS file starts with hsqs; this may be an import that broke off"
            yield at(origin, ERROR, "image-file", f"{shown} is no SquashFS file", why, "import the image again")
        elif not found.st_mode & 0o044:
            why = "it is readable by its owner only: others get `Invalid image format`"
            yield at(origin, WARNING, "image-file", f"{shown} has mode {found.st_mode & 0o777:04o}", why, "chmod a+r")
    finally:
        os.close(descriptor)
    yield from _sidecar(case, path, found.st_size)


def _sidecar(case: Case, path: Path, size_bytes: int) -> Iterator[Finding]:
    """Whether the file fits what `image pull` wrote beside it."""
    origin = case.merged.single["image"].origin
    try:
        facts = described(path)
    except InputError as error:
        yield at(
            origin,
            WARNING,
            "image-file",
            "the sidecar of the image cannot be read",
            short(error, 400),
            "pull the image again",
        )
        return
    if facts is not None:
        for what, why, do in contradictions(path, facts, size_bytes=size_bytes, site=case.site):
            yield at(origin, ERROR, "image-file", short(what), short(why, 300), do)


def _family(case: Case, image: str) -> Iterator[Finding]:
    origin = case.merged.single["image"].origin
    if case.site is not None and case.site.architecture:
        for architecture, pattern in _ARCHITECTURES.items():
            named = re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", image, re.IGNORECASE)
            right = re.search(_ARCHITECTURES[case.site.architecture], image, re.IGNORECASE)
            if named and architecture != case.site.architecture and not right:
                what = f"image {short(image)} is named for {architecture}"
                why = f"{case.site.name} has {case.site.architecture} processors"
                yield at(origin, ERROR, "image-architecture", what, why, f"take the image for {case.site.architecture}")
    annotation = case.merged.annotation
    if re.search(r"(?<![a-z])alpine(?![a-z])", image, re.IGNORECASE) and not case.sarus:
        off = annotation("com.hooks.cxi.enabled") == "false", case.merged.variable("ENROOT_SLURM_HOOK") == "0"
        if not all(off):
            why = "Alpine has musl, and the hooks cxi and slurm call glibc's ldconfig: the container does not start"
            do = 'set com.hooks.cxi.enabled = "false" in [annotations] and ENROOT_SLURM_HOOK = "0" in [env]'
            yield at(origin, ERROR, "image-libc", "an Alpine image under the hooks", why, do)
    elif _OLD_GLIBC.search(image) and _host_libraries(case):
        why = "the host's libraries that the hooks mount want glibc 2.38, and this image has an older one"
        do = 'set com.hooks.netstack.source = "artifact", or take a base with glibc 2.38 (Ubuntu 24.04, Debian 13)'
        yield at(origin, WARNING, "image-libc", f"the name {short(image)} says an old C library", why, do)


def _host_libraries(case: Case) -> bool:
    """Whether the hooks would mount the host's network stack."""
    if case.sarus or case.merged.annotation("com.hooks.cxi.enabled") == "false":
        return False
    source = case.merged.annotation("com.hooks.netstack.source") or (case.site.netstack_default if case.site else "")
    return source == "host"


def cuda_major(image: str) -> int | None:
    """The CUDA major version that an image's name tells, or None. NGC PyTorch: 25.05 has 12.9, 25.11 has 13.0."""
    if match := _NGC_PYTORCH.search(image):
        release = int(match[1]), int(match[2])
        return 12 if release <= (25, 5) and release >= (23, 1) else 13 if release >= (25, 11) else None
    if match := _CUDA.search(image):
        return int(match[1] or match[2])
    return None
