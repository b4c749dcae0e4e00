# Shared by scripts/quickstart, scripts/test and scripts/lock; sourced, never run. Needs bash.
#
# set_up [--dev]   makes .venv in the checkout from requirements/*.txt, or finds that it is there.
# fail CODE TEXT   ends with one line; 3 means that this machine cannot do it.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
locks=$root/requirements
log=$venv/set-up.log
arch=$(uname -m)
torch_index=https://download.pytorch.org/whl/cpu # PyTorch's own index of CPU builds
allow_cuda=${allow_cuda:-no}

# The two packages that exist as source only; both are pure Python. Everything else must come as a wheel.
source_only=antlr4-python3-runtime,wget

say() { printf '%s\n' "$*"; }

fail() {
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

interrupted() {
  printf '\nInterrupted. Type the same command again; what pip has downloaded stays in its cache.\n' >&2
  exit 130
}
trap interrupted INT TERM

# seconds_since START: whole seconds, START being $SECONDS at some earlier time.
seconds_since() { say $((SECONDS - $1)); }

# find_python: sets $python to a Python 3.11 that can make virtual environments.
find_python() {
  local candidate candidates without_venv=
  # All on the PATH, since the first may be a shim that has no 3.11 behind it.
  mapfile -t candidates < <(type -aP python3.11 python3 python)
  for candidate in "${APERTUS_PYTHON:-}" ${candidates[@]+"${candidates[@]}"}; do
    [ -n "$candidate" ] || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      python=$candidate
      return
    fi
    without_venv=$candidate
  done
  [ -z "$without_venv" ] ||
    fail 3 "$without_venv has no venv module; as root: apt-get install python3.11-venv, then type this again"
  fail 3 "no Python 3.11 found; as root: apt-get install python3.11 python3.11-venv (Debian 12, Ubuntu 22.04)," \
    "or set APERTUS_PYTHON to one"
}

# check_machine: ends where nothing can work, warns where it may be too small.
check_machine() {
  local free_kib memory_kib limit
  [ "$(uname -s)" = Linux ] || fail 3 "this is $(uname -s): the locks are for Linux on x86-64 and aarch64"
  [ -f "$locks/linux-$arch.txt" ] || fail 3 "this processor is $arch: the locks are for x86_64 and aarch64"
  free_kib=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
  if [ "$free_kib" -lt $((10 * 1024 * 1024)) ]; then
    say "warning: $((free_kib / 1024)) MiB free in $root; set-up and two runs want 10 GiB (10240 MiB)"
  fi
  memory_kib=$(awk '$1 == "MemTotal:" { print $2 }' /proc/meminfo)
  if limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null) && [ "$limit" != max ] &&
    [ $((limit / 1024)) -lt "$memory_kib" ]; then
    memory_kib=$((limit / 1024))
  fi
  # A machine sold as 8 GiB shows a little less.
  if [ "$memory_kib" -lt $((7680 * 1024)) ]; then
    say "warning: $((memory_kib / 1024)) MiB of memory; training wants up to 8 GiB (8192 MiB)"
  fi
}

# stamp FILE...: what an environment was made from; another lock, another Python or another place gives another stamp.
stamp() {
  (
    cd "$root"
    sha256sum -- "$@"
    printf '%s\n' "$root"
    "$venv/bin/python" -c 'import sys; print(sys.version)'
  ) | sha256sum | cut -d' ' -f1
}

# is_new WHAT FILE...: whether WHAT was last installed from something else than these files.
is_new() { [ "$(stamp "${@:2}")" != "$(cat "$venv/stamp-$1" 2>/dev/null)" ]; }

# pip_install LOCK [OPTION...]: installs a hashed lock as it stands, resolving nothing; output goes to the log.
pip_install() {
  local lock=$1 total code=0
  shift
  total=$(grep -c '^[A-Za-z0-9]' "$lock")
  printf '\n$ pip install -r %s %s\n' "${lock#"$root"/}" "$*" >>"$log"
  "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --require-hashes --no-deps \
    --no-build-isolation --only-binary :all: --no-binary "$source_only" "$@" -r "$lock" </dev/null 2>&1 |
    tee -a "$log" | count_packages "$total" || code=$?
  return "$code"
}

# count_packages TOTAL: on a terminal, one line that counts; elsewhere, nothing.
count_packages() {
  if [ -t 1 ]; then
    awk -v total="$1" '
      /^(Collecting|Requirement already)/ { printf "\r    fetched %d of %d ", ++n, total; fflush() }
      /^Installing collected/ { printf "\r    installing %d packages ", total; fflush() }
      END { printf "\r\033[K" }'
  else
    cat >/dev/null
  fi
}

# show_log: the end of what pip said, where that explains a failure.
show_log() {
  [ -s "$log" ] || return 0
  say "  pip's last words (all of them are in ${log#"$root"/}):"
  tail -n "${1:-6}" "$log" | sed 's/^/    /'
}

# explain_torch: one line on why a source of torch failed.
explain_torch() {
  local words
  words=$(tail -n 12 "$log")
  case "$words" in
    *Retrying*) say "    not to be reached: $(sed -n 's/.*connection broken by \(.*\): .*/\1/p' <<<"$words" | tail -n 1 | cut -c1-160)" ;;
    *"No matching distribution found"*) say "    not there" ;;
    *) show_log ;;
  esac
}

install_torch() {
  local lock=$locks/torch-linux-$arch.txt
  say "  torch, CPU build (200 MB): from where this machine's pip is configured to look"
  if pip_install "$lock"; then return; fi
  explain_torch
  if [ "$arch" = x86_64 ]; then
    say "  torch, CPU build (200 MB): from PyTorch's own index of CPU builds, $torch_index"
    if pip_install "$lock" --index-url "$torch_index" --retries 1 --timeout 20; then return; fi
    explain_torch
    if [ "$allow_cuda" = yes ]; then
      say "  torch, CUDA build with its libraries (about 3 GB to download): because of --allow-cuda"
      if pip_install "$locks/torch-cuda-linux-$arch.txt"; then return; fi
      show_log
    else
      say "  What is left is the CUDA build: about 3 GB to download and 7 GB on disk, of which no GPU code is used here."
      fail 3 "no CPU build of torch could be had: let pip find the wheel (PIP_FIND_LINKS=folder, or an index in" \
        "pip's configuration) and type this again, or add --allow-cuda"
    fi
  fi
  fail 3 "torch could not be installed; $log says why"
}

# must_install LOCK: pip_install, or the end.
must_install() {
  pip_install "$1" && return
  show_log
  fail 3 "${1#"$root"/} could not be installed; is there a network? Type the same command again to go on"
}

# make_venv: an empty environment in place of an older one of ours, marked as incomplete; the mark goes away when the last package is in.
make_venv() {
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/incomplete" ] && [ ! -e "$venv/stamp-packages" ]; then
    fail 2 "$venv is there already, and not made by this: move it away, then type this again"
  fi
  find_python
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail 3 "$python could not make a virtual environment in $venv"
  touch "$venv/incomplete"
  "$venv/bin/python" --version >>"$log"
}

set_up() {
  local dev=no begin=$SECONDS
  [ "${1:-}" = --dev ] && dev=yes
  # What would send pip elsewhere than into .venv; where it looks for packages stays as it is configured.
  unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONHOME PYTHONPATH
  check_machine
  exec 9<"$root"
  if command -v flock >/dev/null && ! flock -n 9; then
    say "Waiting for another set-up of this checkout to end"
    flock 9
  fi

  local base=(requirements/bootstrap.txt "requirements/torch-linux-$arch.txt" "requirements/linux-$arch.txt")
  local dev_lock=requirements/dev-linux-$arch.txt
  if [ -e "$venv/incomplete" ] || ! "$venv/bin/python" -c '' 2>/dev/null ||
    is_new packages "${base[@]}"; then
    say "Set-up: packages at the versions and hashes of requirements/, into .venv (once; about 600 MB to download,"
    say "  2.5 GB on disk, 2 to 10 minutes). Nothing outside .venv is changed but pip's own cache."
    make_venv
    say "  pip, setuptools and hatchling"
    must_install "$locks/bootstrap.txt"
    install_torch
    say "  NeMo, Megatron-core and what they need: $(grep -c '^[A-Za-z0-9]' "$locks/linux-$arch.txt") packages"
    must_install "$locks/linux-$arch.txt"
    rm "$venv/incomplete"
    stamp "${base[@]}" >"$venv/stamp-packages"
  fi
  if [ "$dev" = yes ] && is_new dev "$dev_lock"; then
    say "Set-up: the tools of the tests (50 MB to download)"
    touch "$venv/incomplete"
    must_install "$locks/dev-linux-$arch.txt"
    rm "$venv/incomplete"
    stamp "$dev_lock" >"$venv/stamp-dev"
  fi
  if is_new package pyproject.toml; then
    "$venv/bin/python" -m pip install -q --no-input --disable-pip-version-check --no-deps --no-build-isolation \
      -e "$root" </dev/null >>"$log" 2>&1 || { show_log && fail 4 "apertus-nemo itself could not be installed"; }
    stamp pyproject.toml >"$venv/stamp-package"
    say "Set-up done in $(seconds_since "$begin") s"
  fi
  exec 9<&-
}
