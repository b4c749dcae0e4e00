"""The faults of EDFs one by one, with line, severity, reason and remedy word for word."""

# ruff: noqa: E501, ISC004  (the texts stand as they are printed)

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from apertus_nemo.edf.check import View, check_document, check_file
from apertus_nemo.edf.dialects import CE, SARUS, Dialect
from apertus_nemo.edf.document import parse_document
from apertus_nemo.edf.finding import Fault
from apertus_nemo.edf.sites import SITES

IMAGE = f'image = "/images/gh200-{hashlib.sha256(b"").hexdigest()}.sqsh"\n'
HOST = {"USER": "ada", "HOME": "/users/ada", "SCRATCH": "/scratch/ada"}
HOOK = '[annotations]\ncom.hooks.aws_ofi_nccl.enabled = "true"\n'
PINNED = HOOK + (
    'com.hooks.netstack.source = "artifact"\ncom.hooks.netstack.version = "26.05.1"\n'
    'com.hooks.netstack.name = "gpu:cuda13,cxi:13.1.0,ofi:2.5.1,aws:1.18.0+dl"\n'
)


def findings(text: str, dialect: Dialect = CE, site: str | None = None, **host: str) -> list[str]:
    """What is found: LINE SEVERITY: WHAT | WHY | DO."""
    view = View(dialect, {**HOST, **host}, SITES[site] if site else None, [Path("/nowhere")])
    try:
        report = check_document(parse_document(text.encode(), "x.toml"), view)
    except Fault as error:
        f = error.finding
        return [f"{f.line} {f.severity}: {f.what} | {f.why} | {f.do}"]
    return [f"{f.line} {f.severity}: {f.what} | {f.why} | {f.do}" for f in report.findings]


def only(text: str, dialect: Dialect = CE, site: str | None = None, **host: str) -> str:
    """The one finding there is."""
    (one,) = findings(text, dialect, site, **host)
    return one


GOOD = IMAGE + "entrypoint = false\n"


def test_what_is_right_has_no_findings() -> None:
    good = GOOD + 'mounts = ["/a:/a:ro+private", "${SCRATCH}:${SCRATCH}"]\n' + PINNED + '[env]\nNCCL_PROTO = "^LL128"\n'
    assert findings(good) == findings(good, site="daint") == []
    sarus = good.replace(IMAGE, 'image = "ghcr.io/a/b@sha256:' + "0" * 64 + '"\n').replace("ro+private", "ro")
    sarus = sarus.replace(PINNED, HOOK + 'com.hooks.cxi.enabled = "true"\n')
    assert findings(sarus, SARUS) == []


# 1. Unknown and misspelt keys, keys in the wrong table.


def test_1_misspelt_key() -> None:
    assert only(GOOD + 'mount = ["/a:/a"]\n') == (
        "3 error: 'mount' is not a key of an EDF | no engine reads it, and none says so | write mounts"
    )
    assert only(GOOD + "[annotation]\na.b = 'x'\n").startswith("3 error: 'annotation' is not a key of an EDF")
    assert only(GOOD + "[environment]\nA = 'x'\n").endswith("write env")


def test_1_unknown_key() -> None:
    assert only(GOOD + "comment = 'mine'\n") == (
        "3 warning: 'comment' is not a key of an EDF | no engine reads it, and none says so | remove it"
    )


def test_1_wrong_table() -> None:
    misplaced = '[env]\nA = "1"\n' + GOOD.splitlines()[0] + "\n"
    assert findings(misplaced)[0].startswith("3 error: image stands in [env]")
    assert only(GOOD + '[env]\nA = "1"\nmounts = ["/a:/a"]\n') == (
        "5 error: mounts stands in [env] | in TOML a key belongs to the table above it: the engine sees a variable of "
        "that name | move mounts above the first [table]"
    )
    assert only(GOOD + '[annotations]\ncom.hooks.cxi.enabled = "true"\nwritable = true\n') == (
        "5 error: writable stands in [annotations] | in TOML a key belongs to the table above it: the engine sees an "
        "annotation of that name | move writable above the first [table]"
    )
    assert only(GOOD + 'com.hooks.cxi.enabled = "true"\n') == (
        "3 error: 'com' is not a key of an EDF | no engine reads it here: hooks are controlled by annotations | "
        "put it below [annotations], as com.hooks.NAME.KEY"
    )
    assert only(GOOD + 'NCCL_DEBUG = "INFO"\n').endswith("it looks like an environment variable | put it below [env]")
    assert only(GOOD + '[env]\ncom.hooks.cxi.enabled = "true"\n').startswith("4 error: com stands in [env]")


def test_1_annotations_that_no_hook_reads() -> None:
    assert only(GOOD + '[annotations.com.hooks.ssh]\nenable = "true"\n') == (
        "4 error: com.hooks.ssh.enable is no annotation of a hook | no hook reads it: what this line asks for is not "
        "done, and nothing says so | write com.hooks.ssh.enabled"
    )
    assert only(GOOD + '[annotations]\ncom.hooks.tea.enabled = "true"\n') == (
        "4 warning: com.hooks.tea.enabled is unknown | no documented hook reads it (2026-08) | look for it in the "
        "site's documentation"
    )
    assert only(GOOD + '[annotations]\norg.example.note = "mine"\n[annotations.hooks.cxi]\nenabled = "true"\n') == (
        "6 error: hooks.cxi.enabled is no annotation of a hook | hooks look at com.hooks... only: what this line asks "
        "for is not done, and nothing says so | write com.hooks.cxi.enabled"
    )


# 2. Images by tag, by `latest`, by a path that can change.


def test_2_image_that_can_change() -> None:
    rest = "entrypoint = false\n"
    assert only('image = "nvcr.io/nvidia/pytorch:25.11-py3"\n' + rest) == (
        "1 warning: image by tag only: nvcr.io/nvidia/pytorch:25.11-py3 | a tag can be moved, and a copy in the cache "
        "is not refreshed: two users can get two images | pin the content: a .sqsh file named by its hash"
    )
    assert only('image = "ubuntu:latest"\n' + rest).startswith(
        "1 warning: image ubuntu:latest is whatever is newest | "
    )
    assert only('image = "quay.io#lab/tool"\n' + rest).startswith(
        "1 warning: image quay.io#lab/tool has no tag: it means latest | "
    )
    assert only('image = "localhost:5000/lab/tool:1"\n' + rest, SARUS).endswith(
        "pin the content: a .sqsh file named by its hash, or NAME@sha256:..."
    )
    assert only('image = "/images/torch.sqsh"\n' + rest) == (
        "1 warning: nothing in the name 'torch.sqsh' says what is in the file | whoever writes to this path changes the "
        "run, and no record says which image it was | name the file by its content, as `apertus-nemo image pull` does, "
        "and never overwrite it"
    )


def test_2_variables_in_image() -> None:
    text = 'image = "${REGISTRY}/tool:1"\nentrypoint = false\n'
    assert only(text).startswith("1 warning: ${REGISTRY} in image = '${REGISTRY}/tool:1'")
    assert only(text, REGISTRY="ghcr.io/lab").startswith("1 warning: image by tag only: ghcr.io/lab/tool:1 | ")
    assert only(text, REGISTRY="/images").startswith("1 warning: nothing in the name 'tool:1' says what is in the file")


def test_2_digests() -> None:
    rest = "entrypoint = false\n"
    assert only(f'image = "nvcr.io#nvidia/pytorch@sha256:{"a" * 64}"\n' + rest) == (
        "1 note: image by digest | the reference of the Container Engine lists only [:TAG]; Enroot 4 reads digests, "
        "older ones do not | safer: import it once, and name the .sqsh file by its content"
    )
    for wrong in ("a" * 63, "A" * 64, ""):
        assert only(f'image = "lab/x@sha256:{wrong}"\n' + rest, SARUS).endswith(
            "a digest is sha256: and 64 hexadecimal digits, in small letters | copy all of it"
        )


# 3. Variables.


def test_3_without_braces() -> None:
    assert only(GOOD + 'mounts = ["$SCRATCH:/scratch"]\n') == (
        "3 error: $SCRATCH in mounts = '$SCRATCH:/scratch' | the Container Engine expands ${NAME} only, and takes this "
        "as it stands | write ${SCRATCH}"
    )
    assert only(GOOD + '[env]\nA = "$HOME/x"\n').startswith("4 warning: $HOME in env.A = '$HOME/x'")
    assert findings(GOOD + '[env]\nA = "costs 5$, $${VAR}"\n') == []
    image = f'image = "a/b@sha256:{"0" * 64}"\nentrypoint = false\n'
    assert findings(image + 'mounts = ["$SCRATCH:/scratch"]\n', SARUS) == []


def test_3_undefined() -> None:
    assert only(GOOD + 'workdir = "${MINE}/x"\n') == (
        "3 warning: ${MINE} in workdir = '${MINE}/x' | it is not set here; where it is not, the container does not start"
        " | export it before srun, or write ${MINE:-} if it may be empty"
    )
    assert findings(GOOD + 'workdir = "${MINE}/x"\n', MINE="/m") == []
    assert findings(GOOD + 'workdir = "/x${MINE:-}/${SLURM_JOB_ID}"\n') == []
    sarus = f'image = "a/b@sha256:{"0" * 64}"\nentrypoint = false\nworkdir = "${{MINE}}/x"\n'
    assert "the whole value becomes empty, without a word" in only(sarus, SARUS)


def test_3_in_image_under_sarus() -> None:
    assert only('image = "ghcr.io/${USER}/tool:1"\nentrypoint = false\n', SARUS) == (
        "1 error: a variable in image 'ghcr.io/${USER}/tool:1' | Sarus Suite does not expand variables in image | write "
        "the name out"
    )


def test_3_env_of_env() -> None:
    assert only(GOOD + '[env]\nA = "/a"\nB = "${A}/b"\n', A="/host") == (
        "5 warning: env.B = '${A}/b' | entries of [env] do not see each other: this takes the host's A | write the value out"
    )


def test_3_forms() -> None:
    assert only(GOOD + '[env]\nA = "$(date)"\n') == (
        "4 error: a command in env.A = '$(date)' | no engine runs commands in an EDF: it is taken as it stands | set a "
        "variable in the shell and write ${NAME}"
    )
    assert only(GOOD + '[env]\nA = "${USER:-nobody}"\n').startswith("4 warning: ${USER:-nobody} in env.A")
    assert only(GOOD + '[env]\nA = "${USER"\n').startswith("4 error: '${USER' in env.A = '${USER' has no }")
    image = f'image = "a/b@sha256:{"0" * 64}"\nentrypoint = false\n'
    assert only(image + '[env]\nA = "$${USER}"\n', SARUS).startswith("4 error: $$ in env.A")
    assert only(image + '[env]\nA = "a;b"\n', SARUS) == (
        "4 error: env.A = 'a;b' | Sarus Suite refuses values with ; | write \\;, or do without"
    )
    assert findings(image + '[env]\nA = "${USER:1}"\n', SARUS) == []


# 4. Values that are no strings.


def test_4_not_a_string() -> None:
    assert only(GOOD + "[env]\nOMP_NUM_THREADS = 8\n") == (
        '4 error: OMP_NUM_THREADS in [env] is a number | values of [env] must be strings | write OMP_NUM_THREADS = "8"'
    )
    text = GOOD + "[annotations]\ncom.hooks.cxi.enabled = true\n"
    assert only(text) == (
        "4 error: com.hooks.cxi.enabled is a boolean | the value of an annotation must be a string | write "
        'com.hooks.cxi.enabled = "true"'
    )
    image = f'image = "a/b@sha256:{"0" * 64}"\nentrypoint = false\n'
    assert only(text.replace(GOOD, image), SARUS).startswith("4 note: com.hooks.cxi.enabled is a boolean | Sarus Suite")
    assert only(GOOD + '[annotations]\ncom.hooks.cxi.enabled = "True"\n') == (
        '4 error: com.hooks.cxi.enabled = \'True\' | hooks compare with the text "true" | write "true"'
    )
    assert only(GOOD + 'writable = "true"\n') == (
        "3 error: writable is a string | the reference wants true or false | write writable = true, without quotes"
    )
    assert only(GOOD + 'mounts = "/a:/a"\n').endswith('write mounts = ["/a:/a"]')
    assert only(GOOD + 'mounts = ["/a:/a", 7]\n').startswith("3 error: item 2 of mounts is a number")


# 5. The same table twice.


def test_5_table_twice() -> None:
    text = GOOD + '[annotations]\ncom.hooks.ssh.port = "15263"\n\n[annotations.com.hooks.ssh]\nenabled = "true"\n'
    assert only(text) == (
        "6 error: annotations.com.hooks.ssh is defined a second time (first in line 4) | a table of TOML can be opened in "
        "one place only, and a dotted key in [annotations] opens it too | write all annotations below one [annotations], "
        "as com.hooks.NAME.KEY = ..."
    )
    assert only(GOOD + '[env]\nA = "1"\n[annotations]\na = "b"\n[env]\nB = "2"\n').startswith(
        "7 error: env is defined a second time (first in line 3) | in TOML a key or a table stands in one place only"
    )
    assert only(GOOD + '[env]\nA = "1"\nB = "1"\nA = "2"\n').startswith(
        "6 error: env.A is defined a second time (first in line 4)"
    )


def test_5_annotations_in_two_places() -> None:
    text = GOOD + '[annotations]\ncom.hooks.cxi.enabled = "true"\n[annotations.com.hooks.ssh]\nenabled = "true"\n'
    assert only(text) == (
        "5 note: annotations stand in [annotations.com.hooks.ssh] and as dotted keys (line 4) | the documentation calls a "
        "table that is opened twice invalid, and parsers differ on this form | write all annotations below one "
        "[annotations], as com.hooks.NAME.KEY = ..."
    )
    assert findings(text.replace("[annotations]\ncom.hooks.cxi.enabled", "[annotations.com.hooks.cxi]\nenabled")) == []
    assert findings(text.replace("com.hooks.cxi.enabled", "org.example.note")) == []


def test_5_one_annotation_in_two_spellings() -> None:
    text = GOOD + '[annotations]\ncom.hooks.cxi.enabled = "true"\n"com.hooks.cxi.enabled" = "false"\n'
    assert only(text) == (
        "5 error: com.hooks.cxi.enabled has two values (line 4 has another) | dotted and quoted keys are one annotation; "
        "which of them wins is left to chance | keep one"
    )


# 6. Mounts.


def test_6_mounts() -> None:
    assert only(GOOD + 'mounts = ["/capstor"]\n') == (
        "3 note: mount '/capstor' without a destination | it works here, but stands in no reference, and Sarus Suite "
        'refuses it | write "/capstor:/capstor"'
    )
    assert only(GOOD + 'mounts = ["/a:/a:ro,private"]\n') == (
        "3 error: flags 'ro,private' of a mount | the Container Engine splits flags at +, and takes these for one | write "
        "ro+private"
    )
    assert only(GOOD + 'mounts = [\n  "/a:/x",\n  "/b:/x/"\n]\n') == (
        "5 warning: two mounts at /x | the later one hides that of x.toml:4 | keep one"
    )
    assert only(GOOD + 'mounts = ["/a:/opt"]\n') == (
        "3 warning: a mount at /opt | it hides what the image has there: what runs is not what the image holds | choose "
        "another destination"
    )
    assert only(GOOD + 'mounts = ["/a:/usr/lib/python3.12/site-packages/x"]\n').startswith(
        "3 warning: a mount at /usr/lib"
    )
    assert only(GOOD + 'mounts = ["/a:/b:/c:/d"]\n').startswith("3 error: mount '/a:/b:/c:/d' has 4 fields")
    assert only(GOOD + 'mounts = ["/a:/b:sqsh+ro"]\n').startswith(
        "3 error: flags 'sqsh+ro' of a mount | sqsh must be the"
    )
    assert only(GOOD + 'mounts = ["/a:/b:readonly"]\n').startswith(
        "3 warning: flags 'readonly' of a mount | 'readonly' is"
    )
    assert findings(GOOD + 'mounts = ["${SCRATCH:-}/x:/x", "/d.sqsh:/d:sqsh"]\n') == []


def test_6_libraries_of_the_host() -> None:
    text = GOOD + 'mounts = ["/usr/lib64/libA.so.1:/usr/lib/libA.so.1", "/usr/lib64/libB.so:/lib64/libB.so"]\n'
    assert only(text) == (
        "3 warning: the host's /usr/lib64/libA.so.1 and 1 more in the image | a library of the host in the image: it changes "
        "with the host, and the image's record does not hold it | put it into the image, or leave it to the hooks"
    )
    slurm = (
        'mounts = ["/usr/lib64/libslurm-x.so:/usr/lib64/libslurm-x.so", "/etc/slurm:/etc/slurm", "/a/x.so:/a/x.so"]\n'
    )
    assert findings(GOOD + slurm) == []


def test_6_mounts_under_sarus() -> None:
    image = f'image = "a/b@sha256:{"0" * 64}"\nentrypoint = false\n'
    assert only(image + 'mounts = ["/capstor"]\n', SARUS).startswith("3 error: mount '/capstor' without a destination")
    assert only(image + 'mounts = ["/a:/a:ro+private"]\n', SARUS).startswith("3 error: flags 'ro+private' of a mount")
    assert only(image + 'mounts = ["/a:/a:sqsh"]\n', SARUS).startswith("3 error: flags 'sqsh' of a mount | Sarus Suite")


# 7. The home.


@pytest.mark.parametrize("mount", ["/users", "/users:/users", "${HOME}:${HOME}", "/users/ada:/users/ada"])
def test_7_home(mount: str) -> None:
    found = [line for line in findings(GOOD + f'mounts = ["{mount}"]\n') if "is mounted" in line]
    assert [line.split(" | ", 1)[1] for line in found] == [
        "packages in ~/.local win over those of the image, and init scripts and caches come along | mount the folders "
        'that the job needs, or set PYTHONNOUSERSITE = "1" in [env]'
    ]
    assert "3 note: " in only(GOOD + 'mounts = ["/users:/users"]\n[env]\nPYTHONNOUSERSITE = "1"\n')


def test_7_home_under_the_hook_ssh() -> None:
    assert only(GOOD + 'mounts = ["/users:/users"]\n[annotations.com.hooks.ssh]\nenabled = "true"\n') == (
        "3 warning: /users is mounted | the home's .ssh hides the key that the hook ssh authorizes; init scripts and "
        "caches come along | mount the folders that the job needs"
    )
    assert findings(GOOD + 'mounts = ["/users/ada/project:/project"]\n') == []


# 8. Paths and files.


def test_8_relative_paths() -> None:
    rest = "entrypoint = false\n"
    assert only('image = "images/torch.sqsh"\n' + rest) == (
        "1 error: image 'images/torch.sqsh' is no path | a path starts with / or ./: this is taken for a name on Docker "
        "Hub | write the absolute path"
    )
    assert findings('image = "./torch.sqsh"\n' + rest)[0] == (
        "1 warning: image is a relative path | it starts in the folder in which srun is called, not at this file | write "
        "the absolute path"
    )
    assert only(GOOD + 'workdir = "work"\n').startswith("3 error: workdir 'work' is no absolute path")
    assert only(GOOD + 'mounts = ["data:/data"]\n').startswith(
        "3 error: the source 'data' of a mount is no absolute path"
    )
    assert only(GOOD + 'mounts = ["~/data:/data"]\n').endswith("no engine replaces ~ | write ${HOME}")


def test_8_files_on_disk(tmp_path: Path) -> None:
    image = tmp_path / f"x-{'0' * 64}.sqsh"
    rest = "entrypoint = false\n"
    text = f'image = "{image}"\n' + rest
    assert only(text).startswith(f"1 error: there is no {image} | files on scratch are removed")
    assert only(text.replace(str(tmp_path), f"{tmp_path}/none")) == (
        f"1 warning: there is no {tmp_path}/none/{image.name} | its folder is not on this machine either | correct the path, "
        "unless this is another machine"
    )
    image.write_bytes(b"<html>")
    assert only(text) == (
        f"1 error: {image} is no SquashFS file | a SquashFS file starts with hsqs; this may be an import that broke off | "
        "import the image again"
    )
    image.write_bytes(b"hsqs")
    image.chmod(0o600)
    assert only(text) == (
        f"1 warning: {image} has mode 0600 | it is readable by its owner only: others get `Invalid image format` | chmod a+r"
    )
    image.chmod(0o644)
    assert findings(text) == []
    image.unlink()
    os.mkfifo(image)
    assert only(text).startswith(f"1 error: {image} is no file")
    for folder in ("/", "//", "/.", "/.."):  # paths without a name
        assert any(
            line.endswith(" is no file | an image is a regular file | name the SquashFS file")
            for line in findings(f'image = "{folder}"\n' + rest)
        ), folder


def test_8_architecture() -> None:
    text = f'image = "/images/x86_64/torch-{"0" * 64}.sqsh"\nentrypoint = false\n'
    assert findings(text) == findings(text, site="bristen") == []
    assert only(text, site="clariden").endswith(
        "is named for x86_64 | clariden has aarch64 processors | take the image for aarch64"
    )


# 9. Images that carry their own network stack.


def test_9_own_network_stack() -> None:
    image = f'image = "ghcr.io/eth-cscs/alps-extended-images/ngc-pytorch@sha256:{"0" * 64}"\n'
    launch = "start it with srun --network=disable_rdzv_get --mpi=pmix"
    good = image + 'entrypoint = true\n[annotations]\ncom.hooks.cxi.enabled = "false"\n'
    assert [line for line in findings(good) if "own network" in line] == [
        f"1 note: the image carries its own network stack | its settings want it: the rendezvous protocol alt_read, and PMIx | {launch}"
    ]
    wrong = " ".join(findings(image + HOOK))
    for part in (
        "3 error: aws_ofi_nccl is enabled, and the image carries its own network stack",
        'the hook cxi is on by default and replaces its libfabric | set com.hooks.cxi.enabled = "false"',
        "its entrypoint sets the environment of NCCL and libfabric | write entrypoint = true",
        launch,
    ):
        assert part in wrong


# 10. Images with the network stack of the hooks.


def test_10_pinning_the_network_stack() -> None:
    protocol = '[env]\nNCCL_PROTO = "^LL128"\n'
    assert only(GOOD + HOOK + protocol) == (
        "4 warning: the network stack is not pinned | the site's default of the day is used; Daint's went from host to "
        "artifact on 2026-06-17 | set com.hooks.netstack.source, com.hooks.netstack.version, com.hooks.netstack.name; "
        "`apertus-nemo edf explain com.hooks.netstack` says to what"
    )
    moving = PINNED.replace("26.05.1", "latest").replace("gpu:cuda13,cxi:13.1.0,ofi:2.5.1,aws:1.18.0+dl", "default")
    first, second = findings(GOOD + moving + protocol)
    assert first == (
        '6 warning: netstack.version = "latest" | it is a link that the site moves: the same file then means another '
        "network stack | write the version that it means today: ls -l of the artifacts' folder"
    )
    assert second.startswith('7 warning: netstack.name = "default"')


def test_10_variant_and_cuda() -> None:
    protocol = '[env]\nNCCL_PROTO = "^LL128"\n'
    host = HOOK + 'com.hooks.netstack.source = "host"\n'
    ngc = 'image = "nvcr.io/nvidia/pytorch:25.11-py3"\nentrypoint = false\n'
    found = findings(ngc + host + 'com.hooks.aws_ofi_nccl.variant = "cuda12"\n' + protocol)
    assert found[1:] == [
        "6 error: variant cuda12 for an image with CUDA 13 | a numbered plugin is linked against its CUDA; NCCL does not "
        "find it and falls back to TCP, or fails | write cuda-dl, or cuda13"
    ]
    for right in ("cuda13", "cuda-dl"):
        assert findings(ngc + host + f'com.hooks.aws_ofi_nccl.variant = "{right}"\n' + protocol)[1:] == []
    assert findings(ngc + host + protocol)[1:] == [
        "4 warning: no variant of the plugin | each plugin of the host is built for one CUDA | set "
        "com.hooks.aws_ofi_nccl.variant to cuda13, or to cuda-dl"
    ]
    assert only(GOOD + host + 'com.hooks.aws_ofi_nccl.variant = "cuda"\n' + protocol).startswith(
        "6 error: com.hooks.aws_ofi_nccl.variant = 'cuda' | documented are cuda12, cuda13, cuda-dl, rocm5, rocm6"
    )


# 11. NCCL_NET_PLUGIN.


def test_11_net_plugin() -> None:
    rest = '[env]\nNCCL_PROTO = "^LL128"\nNCCL_NET_PLUGIN = "ofi"\n'
    assert only(GOOD + rest + 'NCCL_NET = "AWS Libfabric"\n') == (
        "5 error: NCCL_NET_PLUGIN = 'ofi' | NCCL prefers it to NCCL_NET, looks for another library and ends with "
        '`network AWS Libfabric not found` | remove it, or write NCCL_NET_PLUGIN = ""'
    )
    assert "the hook aws_ofi_nccl, which sets NCCL_NET" in only(GOOD + PINNED + rest)
    assert findings(GOOD + rest) == findings(GOOD + PINNED + rest.replace('"ofi"', '""')) == []


# 12. C libraries.


def test_12_c_library() -> None:
    alpine = f'image = "docker.io/library/alpine@sha256:{"0" * 64}"\nentrypoint = false\n'
    assert [line for line in findings(alpine) if "Alpine" in line] == [
        "1 error: an Alpine image under the hooks | Alpine has musl, and the hooks cxi and slurm call glibc's ldconfig: the "
        'container does not start | set com.hooks.cxi.enabled = "false" in [annotations] and ENROOT_SLURM_HOOK = "0" in [env]'
    ]
    assert findings(alpine, SARUS) == []
    old = 'image = "nvidia/cuda:12.8.1-devel-ubuntu22.04"\nentrypoint = false\n'
    found = [
        line for line in findings(old + '[annotations]\ncom.hooks.netstack.source = "host"\n') if "C library" in line
    ]
    assert found == [
        "1 warning: the name nvidia/cuda:12.8.1-devel-ubuntu22.04 says an old C library | the host's libraries that the "
        'hooks mount want glibc 2.38, and this image has an older one | set com.hooks.netstack.source = "artifact", or '
        "take a base with glibc 2.38 (Ubuntu 24.04, Debian 13)"
    ]
    assert [line for line in findings(old, site="daint") if "C library" in line] == []
    assert len([line for line in findings(old, site="bristen") if "C library" in line]) == 1


# 13. The entrypoint.


def test_13_entrypoint() -> None:
    assert only(IMAGE) == (
        "None note: entrypoint is not set | the reference says false, the code of Sarus Suite says true: the entrypoint "
        "may run or not | write entrypoint = false, or true"
    )
    assert only(f'image = "a/b@sha256:{"0" * 64}"\n', SARUS).startswith("None warning: entrypoint is not set | ")


# 14. Inheritance.


def test_14_depth(tmp_path: Path) -> None:
    for level in range(12):
        (tmp_path / f"l{level}.toml").write_text(f'base_environment = "{tmp_path}/l{level + 1}.toml"\n')
    (tmp_path / "l12.toml").write_text(GOOD)
    report = check_file(tmp_path / "l0.toml", View(CE, HOST))
    (finding,) = [f for f in report.findings if f.rule == "base-depth"]
    assert (finding.file, finding.line, finding.severity) == (f"{tmp_path}/l9.toml", 1, "error")
    assert finding.what == f"base_environment '{tmp_path}/l10.toml' is level 11"
    assert finding.why == "both engines stop after 10 levels"
    assert [f for f in check_file(tmp_path / "l3.toml", View(CE, HOST)).findings if f.severity == "error"] == []


def test_14_circle(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text(f'base_environment = "{b}"\n')
    b.write_text(f'base_environment = ["{tmp_path}/link.toml"]\n')
    (tmp_path / "link.toml").symlink_to(a)
    (finding,) = [f for f in check_file(a, View(CE, HOST)).findings if f.severity == "error"]
    assert (finding.file, finding.line) == (str(b), 1)
    assert finding.why == f"an EDF cannot inherit from itself: {a} -> {b} -> {a}"


def test_14_found_by_search(tmp_path: Path) -> None:
    (tmp_path / "team.toml").write_text(GOOD)
    text = 'base_environment = "team"\n'
    view = View(CE, {**HOST, "EDF_PATH": f"/nowhere:{tmp_path}"})
    (finding,) = check_document(parse_document(text.encode(), "x.toml"), view).findings
    assert (finding.severity, finding.line) == ("warning", 1)
    assert finding.what == "base_environment 'team' is searched for"
    assert finding.why == "which file it is depends on EDF_PATH and the home of who starts the job"
    missing = findings(text.replace('"team"', '["team"]'))
    assert missing[0] == (
        "1 error: base_environment 'team' was not found | searched: /nowhere | set EDF_PATH or give --edf-path, or write an absolute path"
    )


# 15. LL128.


def test_15_ll128() -> None:
    why = "NCCL 2.27.3 and later add up wrongly with LL128 on GH200 and Slingshot, in about 30 % of runs and silently"
    do = 'set NCCL_PROTO = "^LL128", FI_CXI_RDZV_THRESHOLD = "0" and FI_CXI_RDZV_GET_MIN = "0" in [env]'
    assert only(GOOD + PINNED) == (
        f"4 warning: nothing keeps NCCL from LL128 | {why}; the hook sets NCCL_PROTO only since Container Engine 26.06.1 | {do}"
    )
    assert only(GOOD + PINNED + '[env]\nNCCL_PROTO = "LL,LL128,Simple"\n') == (
        f"9 error: NCCL_PROTO = 'LL,LL128,Simple' lets NCCL choose LL128 | {why} | {do}"
    )
    assert "error" in only(GOOD + PINNED + '[env]\nNCCL_PROTO = "^LL"\n')
    for right in ("^LL128", "^LL,LL128", "Simple", "simple,ll", "^ll128"):
        assert findings(GOOD + PINNED + f'[env]\nNCCL_PROTO = "{right}"\n') == []
    second = '[env]\nFI_CXI_RDZV_THRESHOLD = "0"\nFI_CXI_RDZV_GET_MIN = "0"\n'
    assert findings(GOOD + PINNED + second) == []
    assert findings(GOOD + '[env]\nNCCL_PROTO = "LL128"\n') == []  # no Slingshot


# What the list does not hold.


def test_secrets() -> None:
    token = "hf_" + "a" * 30
    found = only(GOOD + f'[env]\nHF_TOKEN = "{token}"\n')
    assert found == (
        "4 warning: HF_TOKEN in [env] looks like a secret | the name of the key is that of a secret; EDFs are shared, "
        "copied and recorded | remove it: the host's environment reaches the container, so export HF_TOKEN before srun"
    )
    assert token not in found
    assert findings(GOOD + '[env]\nHF_TOKEN = "${HF_TOKEN}"\nHF_TOKEN_PATH = "/t"\n', HF_TOKEN="x") == []


def test_placeholders() -> None:
    assert only('image = "/scratch/<USER>/x.sqsh"\nentrypoint = false\n') == (
        "1 error: <USER> in image was not replaced | no engine replaces it | write the real name; variables are written ${NAME}"
    )
    assert only('image = "/images/YOUR_IMAGE.sqsh"\nentrypoint = false\n').startswith(
        "1 error: YOUR_IMAGE in image was not"
    )
    assert only(GOOD + 'workdir = "/users/your_name"\n').startswith("3 error: your_name in workdir was not replaced")
    assert findings(GOOD + 'workdir = "/do-it-your-own-way/{}"\n') == []
    assert only(GOOD + 'mounts = ["/scratch/<user name>:/x"]\n').startswith(
        "3 error: <user name> in a mount was not replaced"
    )


def test_hooks_that_are_not_enabled() -> None:
    assert only(GOOD + '[annotations]\ncom.hooks.aws_ofi_nccl.variant = "cuda-dl"\n') == (
        "4 warning: com.hooks.aws_ofi_nccl.variant without com.hooks.aws_ofi_nccl.enabled | the hook is off by default | "
        'add com.hooks.aws_ofi_nccl.enabled = "true", or remove the line'
    )


def test_writable_hooks() -> None:
    text = GOOD + 'writable = false\n[annotations]\ncom.hooks.nvidia_cuda_mps.enabled = "true"\n'
    assert only(text) == (
        "3 error: writable = false beside com.hooks.nvidia_cuda_mps.enabled | the hook nvidia_cuda_mps writes into the "
        "container | write writable = true"
    )


def test_toml_that_is_none() -> None:
    assert only("image = ubuntu:24.04\n").endswith('text stands in quotes in TOML | put the value into "..."')
    assert only('image: "ubuntu"\n').endswith('this line looks like YAML | write it as key = "value"')
    assert (
        only('image = "a",\n')
        == "1 error: a comma at the end of the line | TOML has none between keys | remove the comma"
    )
    assert only('mounts = [\n  "/a:/a"\n  "/b:/b",\n]\n') == (
        "3 error: not TOML: Unclosed array | a comma is missing between two items, or ] at the end | look at this line and "
        "the one before"
    )
    assert only("\ufeffimage = 'a'\n").startswith("1 error: the file starts with a byte order mark")
