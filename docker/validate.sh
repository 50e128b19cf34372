#!/usr/bin/env bash
# Builds docker/Dockerfile without a container engine or registry, and checks the image.  See README.md for
# what that proves and what it does not.
#
#   bash docker/validate.sh            PyTorch for the CPU, Debian 12 as the base (Python 3.11)
#   bash docker/validate.sh --cuda     the Dockerfile's default: PyPI's PyTorch, which is for CUDA, with
#                                      Ubuntu 24.04 as the base (Python 3.12)
#       --skip-training                do not train, or stop a training, in the image
#
# buildah runs the Dockerfile in a chroot; a debootstrap system under the name in FROM is its base.
# Needs root on Debian or Ubuntu (x86_64), apt and a package index; installs buildah and debootstrap where missing.
# This machine's pip settings (index, mirror, certificate) apply to the build and stay out of the image.
# Everything else is in one temporary folder, which is removed afterwards.
#
#   TMPDIR            where that folder is made (default /var/tmp): 8 GB free, 20 GB with --cuda
#   TORCH_INDEX_URL   index of PyTorch's CPU builds (default https://download.pytorch.org/whl/cpu; if that cannot be
#                     reached, an index is made from the CPU build that pip's settings offer)
#   SORA_MIRROR       mirror for debootstrap
set -euo pipefail
self=docker/$(basename "${BASH_SOURCE[0]}")
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

variant=cpu
train=yes
for option in "$@"; do
  case $option in
    --cuda) variant=cuda ;;
    --skip-training) train=no ;;
    *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$self" >&2; exit 2 ;;
  esac
done

stop() {
  echo "validate.sh: $*" >&2
  exit 2
}

# ----- the outer half: tools and a folder; it starts the inner half in namespaces of its own, and cleans up -----------

if [ -z "${SORA_VALIDATE_FOLDER:-}" ]; then
  [ "$(id -u)" = 0 ] || stop "it needs root, for chroot and debootstrap"
  [ "$(uname -m)" = x86_64 ] || stop "it is written for x86_64"
  missing=()
  for tool in buildah debootstrap python3 curl; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || stop "install ${missing[*]}"
    echo "installing ${missing[*]} and leaving it installed"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
  parent=${TMPDIR:-/var/tmp}
  needed=$([ "$variant" = cuda ] && echo 20 || echo 8)
  free=$(df --output=avail -BG "$parent" | tail -1 | tr -dc 0-9)
  [ "$free" -ge "$needed" ] || stop "$parent has $free GB free, $needed are needed: set TMPDIR"
  folder=$(mktemp -d "$parent/sora-validate.XXXXXX") inner=''
  clean_up() { # what is mounted below the folder is mounted for the inner half alone: rm cannot reach through it
    [ -z "$inner" ] || kill "$inner" 2>/dev/null || true # and with it everything it has started
    wait
    for _ in {1..20}; do
      rm -rf "$folder" 2>/dev/null && return
      sleep 0.5
    done
    rm -rf "$folder"
  }
  trap clean_up EXIT
  trap 'exit 143' INT TERM
  mkdir "$folder/tmp"
  SORA_VALIDATE_FOLDER=$folder TMPDIR=$folder/tmp unshare --mount --propagation private --pid --fork --kill-child \
    --mount-proc nice -n 10 bash "$self" "$@" &
  inner=$!
  wait "$inner" && code=0 || code=$?
  inner=''
  exit "$code"
fi

# ----- the inner half -------------------------------------------------------------------------------------------------

folder=$SORA_VALIDATE_FOLDER
context=$folder/context
image=localhost/sora-llm:$variant
base=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)
export BUILDAH_ISOLATION=chroot

store() { buildah --root "$folder/store" --runroot "$folder/run" --storage-driver overlay "$@"; }

announce() { printf '\n== %s\n' "$*"; }

results=()
failures=0

check() { # check <what> <function>: the function fails, or prints what it found; its last line goes into the table
  local what=$1 output last code=0 started=$SECONDS
  shift
  set +e # as a condition ("if output=...") the function would run on after its first failure
  output=$(set -e; "$@" 2>&1)
  code=$?
  set -e
  if [ "$code" = 0 ]; then
    last=$(tail -n 1 <<<"$output")
    results+=("ok      $what|$last")
  else
    failures=$((failures + 1))
    results+=("FAILED  $what|see above")
    printf -- '---- FAILED: %s\n%s\n' "$what" "$output" >&2
  fi
  printf '%s (%s s)\n' "${results[-1]/|/: }" $((SECONDS - started))
}

in_image() { store run "$container" -- "$@"; } # as the image's user, in its folder, with its environment

# ----- a base under the name in the Dockerfile's FROM -----------------------------------------------------------------

make_base() {
  local suite mirror script=() options=() keyring deb
  if [ "$variant" = cpu ]; then
    suite=bookworm mirror=${SORA_MIRROR:-http://deb.debian.org/debian}
  else
    suite=noble mirror=${SORA_MIRROR:-http://archive.ubuntu.com/ubuntu}
    script=(/usr/share/debootstrap/scripts/gutsy) # all of Ubuntu's are this one; Debian 12 does not know noble's name
    options+=("--components=main,universe") # as in Ubuntu's images
    keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg
    if [ ! -f "$keyring" ]; then # on Debian; its checksum is the one that Ubuntu 24.04's signed index gives
      deb=$folder/keyring.deb keyring=$folder/keyring/usr/share/keyrings/ubuntu-archive-keyring.gpg
      curl -fsS -o "$deb" \
        http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb
      sha256sum --quiet -c - <<<"36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8  $deb"
      dpkg-deb -x "$deb" "$folder/keyring"
    fi
    options+=("--keyring=$keyring")
  fi
  local log=$folder/debootstrap.log
  debootstrap --variant=minbase "${options[@]}" "$suite" "$folder/base" "$mirror" "${script[@]}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; stop "debootstrap $suite failed"; }
  grep -q "Valid Release signature" "$log" || stop "debootstrap did not check the signature of $mirror"
  rm -rf "$folder"/base/var/lib/apt/lists/* "$folder"/base/var/cache/apt/*
  if [ "$variant" = cuda ]; then # what the real base has and debootstrap has not
    chroot "$folder/base" useradd --create-home --uid 1000 ubuntu
  fi
  local working
  working=$(store from scratch)
  store add -q "$working" "$folder/base" / >/dev/null
  store config --env NVIDIA_VISIBLE_DEVICES=all --env NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    --entrypoint '["/opt/nvidia/nvidia_entrypoint.sh"]' --cmd /bin/bash "$working"
  store commit -q --rm "$working" "docker.io/$base" >/dev/null
  rm -rf "$folder/base"
}

# ----- this machine's pip settings, for the build alone ---------------------------------------------------------------

# Writes pip.conf, which the build gets as a secret, and private, strings that must not be in the image.  Folders
# named in the settings are bound below pip/, which the build sees as /mnt: that exists in every base and stays empty.
pip_settings() {
  mkdir "$folder/pip"
  python3 - "$folder" <<'PYTHON'
import ast, shutil, subprocess, sys
from pathlib import Path

folder = Path(sys.argv[1])
run = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
settings = {}
for line in run.stdout.splitlines():
    name, _, value = line.partition("=")
    section, _, key = name.rpartition(".")
    value = ast.literal_eval(value)
    if section == ":env:" or (section in ("global", "install") and (":env:", key) not in settings):
        settings[section, key] = value
merged = {}
for section in ("global", "install", ":env:"):  # the later one wins, as in pip
    merged.update({key: value for (place, key), value in settings.items() if place == section})

folders, private = [], []

def bound(path: Path) -> str:
    """A folder of this machine, as the build sees it."""
    folders.append(path)
    return f"/mnt/{len(folders)}"

marker = "# this file stays out of the image"
private.append(marker)
lines = [marker, "[global]"]
for key in ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "proxy", "timeout", "retries"):
    words = str(merged.get(key, "")).split()
    if not words:
        continue
    if key not in ("timeout", "retries", "cert"):
        private += words
    for i, word in enumerate(words):
        path = Path(word.removeprefix("file://"))
        if word.startswith("file://") and key.endswith("index-url"):
            words[i] = f"file://{bound(path.parent)}/{path.name}"  # its pages point to ../
        elif key == "find-links" and path.is_dir():
            words[i] = bound(path.resolve())
        elif key == "cert":
            shutil.copy(path, folder / "pip/ca.pem")
            words[i] = "/mnt/ca.pem"
    lines.append(f"{key} = " + "\n    ".join(words))
(folder / "pip.conf").write_text("\n".join(lines) + "\n")
(folder / "private").write_text("".join(f"{word}\n" for word in private))
for number, path in enumerate(folders, start=1):
    (folder / f"pip/{number}").mkdir()
    subprocess.run(["mount", "--bind", path, folder / f"pip/{number}"], check=True)
PYTHON
}

# For TORCH_INDEX_URL if no index of CPU builds can be reached: an index of the one wheel that pip's settings offer.
local_torch_index() {
  local wheels=$folder/pip/torch-index/torch wheel
  mkdir -p "$wheels"
  python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_x86_64 -c constraints.txt -d "$wheels" torch >"$folder/torch.log" 2>&1 ||
    { cat "$folder/torch.log" >&2; stop "no index of PyTorch's CPU builds can be reached: set TORCH_INDEX_URL"; }
  wheel=$(basename "$wheels"/*.whl)
  [[ $wheel == *+cpu-* ]] || stop "no index of PyTorch's CPU builds can be reached, and pip's settings offer $wheel: \
set TORCH_INDEX_URL, or use --cuda"
  echo "<a href=\"${wheel/+/%2B}\">$wheel</a>" >"$wheels/index.html"
}

# ----- building -------------------------------------------------------------------------------------------------------

copy_context() { # what a clone holds, and what must not get from a working folder into an image
  mkdir "$context"
  tar -cf - --exclude=__pycache__ --exclude=outputs --exclude='*.egg-info' .dockerignore -- * | tar -xf - -C "$context"
  mkdir -p "$context"/{.git,.venv/bin,.ssh,outputs/run,sora_llm/__pycache__}
  for decoy in .git/config .venv/bin/python .ssh/id_rsa .env .netrc id_rsa pip.conf outputs/run/adapter.safetensors \
    sora_llm/.env sora_llm/__pycache__/decoy.pyc configs/.token launch/token.txt; do
    echo "decoy-that-must-stay-out" >"$context/$decoy"
  done
}

build() { # build <tag> <log>: what somebody would give to docker build, and this machine's pip settings
  store bud --layers --pull-never --secret "id=pip,src=$folder/pip.conf" --volume "$folder/pip:/mnt:ro" \
    --build-arg "TORCH_INDEX_URL=$torch_index" --build-arg VERSION=0.0.validate --build-arg REVISION=none \
    -f docker/Dockerfile -t "$1" "$context" >"$2" 2>&1 || { tail -n 40 "$2" >&2; stop "the build failed"; }
}

# layers <tag> <base>: a line per layer above the base, top last: id, MB, the instruction that made it
layers() {
  store inspect --type image "$1" >"$folder/inspect.json"
  python3 - "$folder" "$1" "docker.io/$base" <<'PYTHON'
import json, re, sys
from pathlib import Path

folder, tag, base = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
layers = {layer["id"]: layer for layer in json.loads((folder / "store/overlay-layers/layers.json").read_text())}
images = json.loads((folder / "store/overlay-images/images.json").read_text())
tops = {name: image["layer"] for image in images for name in image.get("names", [])}

def chain(top):
    while top:
        yield layers[top]
        top = layers[top].get("parent")

below = {layer["id"] for layer in chain(tops[base])}
above = [layer for layer in chain(tops[tag]) if layer["id"] not in below][::-1]
history = json.loads((folder / "inspect.json").read_text())["OCIv1"]["history"]
history = [step for step in history if not step.get("empty_layer")]
around = re.compile(r"^(/bin/sh -c |#\(nop\) |\|\d+ (\S+=\S* )*|--mount=\S+ )*")
for layer, step in zip(above, history[-len(above):], strict=True):
    made_by = around.sub("", " ".join(step.get("created_by", "").split()))
    print(layer["id"], f"{layer['diff-size'] / 1e6:.1f}", made_by, sep="\t")
PYTHON
}

# ----- checks ---------------------------------------------------------------------------------------------------------

the_build_context() {
  local listing unwanted
  printf 'FROM scratch\nCOPY . /\n' >"$folder/Dockerfile.context"
  store bud --pull-never -q -f "$folder/Dockerfile.context" -t localhost/context "$context" >/dev/null
  listing=$(cd "$(store mount "$(store from --name context localhost/context)")" && find . -type f -printf '%P\n')
  store rm context >/dev/null
  unwanted=$(grep -vxE -e 'LICENSE|README\.md|constraints\.txt|pyproject\.toml' -e '(configs|launch)/[a-z0-9_]+\.yaml' \
    -e 'sora_llm/([a-z0-9_]+/)*[a-z0-9_]+\.(py|jinja|json|html|css|js)' -e 'sora_llm/py\.typed' <<<"$listing") || true
  [ -z "$unwanted" ] || { echo "$unwanted"; return 1; }
  ! grep -rl decoy-that-must-stay-out "$(store mount "$container")"/{workspace,home,opt} 2>/dev/null || return 1
  echo "$(wc -l <<<"$listing") files, all of the package, configs and launchers; no decoy"
}

the_configuration() {
  store inspect --type image "$image" | python3 -c '
import json, sys
config = json.load(sys.stdin)["OCIv1"]["config"]
labels = config["Labels"]
assert config["User"] == "10001:10001", config["User"]
assert config["WorkingDir"] == "/workspace", config["WorkingDir"]
assert config["Entrypoint"] == ["tini", "-s", "--"] and config["Cmd"] == ["sora-llm", "--help"], config
wanted = {"title", "description", "licenses", "version", "revision", "base.name"}
missing = {f"org.opencontainers.image.{name}" for name in wanted} - {key for key, value in labels.items() if value}
assert not missing, missing
assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"], "the variables of the base are gone"
print("user", config["User"], "entrypoint", *config["Entrypoint"], "command", *config["Cmd"], "labels", len(wanted))'
}

no_secrets() {
  store inspect --type image "$image" >"$folder/inspect.json"
  python3 - "$folder" <<'PYTHON'
import json, re, sys
from pathlib import Path

folder = Path(sys.argv[1])
image = json.loads((folder / "inspect.json").read_text())["OCIv1"]
names = [entry.partition("=")[0] for entry in image["config"]["Env"]]
secret = [n for n in names if re.search(r"^PIP_|PROXY|TOKEN|SECRET|PASSW|CREDENTIAL|_KEY|AUTH", n, re.I)]
assert not secret, secret
text = json.dumps(image)
leaked = [word for word in (folder / "private").read_text().splitlines() if word in text]
assert not leaked, f"{len(leaked)} of this machine's pip settings in the image's configuration or history"
print(f"{len(names)} variables, none of them PIP_*, a proxy or a token")
PYTHON
}

no_leftovers() { # in any layer above the base: what a later layer deletes is still shipped
  local id diff
  while IFS=$'\t' read -r id _ _; do
    diff=$folder/store/overlay/$id/diff
    # A character device marks a file deleted by the layer.
    find "$diff" ! -type c \( -name .git -o -name .env -o -name .netrc -o -name .pypirc -o -name .ssh -o -name .docker \
      -o -name 'id_rsa*' -o -name '*.deb' -o -name 'pip.conf' -o -name .cache -o -name 'decoy*' \
      -o -path "$diff/var/lib/apt/lists/?*" -o -path "$diff/var/cache/apt/?*" -o -path "$diff/tmp/?*" \
      -o -path "$diff/cache/?*" -o -path "$diff/mnt/?*" -o -path "$diff/src" -o -path "$diff/installed" \) -print
    # grep exits with 1 without a match and with 2 if a layer has no such folder; only its output counts.
    grep -rsIlF -f "$folder/private" "$diff"/{etc,home,root,usr/local,var,workspace,opt/sora_llm,opt/venv/bin} || true
    find "$diff" -type d -name '*.dist-info' -prune -exec grep -rsIlF -f "$folder/private" {} + || true
  done <"$folder/layers.1" >"$folder/leftovers"
  [ ! -s "$folder/leftovers" ] || { cat "$folder/leftovers"; return 1; }
  echo "no package lists, caches, keys, .git or pip settings in any of $(wc -l <"$folder/layers.1") layers"
}

the_default_command() { # docker run <image>
  in_image tini -s -- sora-llm --help | grep "usage: sora-llm"
}

the_real_command() { # docker run <image> accelerate launch -m sora_llm.train configs/llama7b.yaml --print-config
  local log=$folder/config.txt
  in_image tini -s -- accelerate launch -m sora_llm.train configs/llama7b.yaml --print-config >"$log" 2>&1 ||
    { cat "$log"; return 1; }
  grep -q 'name_or_path: huggyllama/llama-7b' "$log" || { cat "$log"; return 1; }
  echo "reads configs/llama7b.yaml"
}

the_imports() {
  in_image python -c '
import torch, bitsandbytes, deepspeed, transformers, peft, accelerate, datasets, sora_llm
assert sora_llm.__file__.startswith("/opt/venv/lib/"), sora_llm.__file__
print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__, "deepspeed", deepspeed.__version__)' |
    tail -n 1
}

the_torch_build() {
  in_image python - "$variant" <<'PYTHON'
import ctypes, os, subprocess, sys
from pathlib import Path
import bitsandbytes, torch

variant = sys.argv[1]
cuda = torch.version.cuda
if variant == "cpu":
    assert cuda is None, f"a build for CUDA {cuda}"
    print("a CPU build, no CUDA libraries")
else:
    library = Path(bitsandbytes.__file__).parent / f"libbitsandbytes_cuda{cuda.replace('.', '')}.so"
    assert library.exists(), f"bitsandbytes has no {library.name}"
    # On a GPU DeepSpeed chooses cuda by itself; without nvcc (the base has none) older versions failed to import then.
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    subprocess.run([sys.executable, "-c", "import deepspeed"], env=environment, check=True, capture_output=True)
    ctypes.CDLL("libibverbs.so.1")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print(f"CUDA {cuda}, {library.name}, NCCL {nccl}, libibverbs; deepspeed starts without nvcc")
PYTHON
}

the_versions() {
  in_image python - <"$folder/versions.py"
}

cat >"$folder/versions.py" <<'PYTHON'
from importlib.metadata import distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pins = {}
for line in open("/opt/sora_llm/constraints.txt"):
    if line.strip() and not line.startswith("#"):
        requirement = Requirement(line.strip())
        if requirement.marker is None or requirement.marker.evaluate():
            pins[canonicalize_name(requirement.name)] = requirement
found = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
wrong = {name: version for name, version in found.items() if name in pins and version not in pins[name].specifier}
assert not wrong, wrong
free = sorted(f"{name} {version}" for name, version in found.items() if name not in {*pins, "pip", "sora-llm"})
nvidia = [name for name in free if name.startswith(("nvidia-", "cuda-", "triton "))]
assert free == nvidia, free  # PyTorch's own requirements pin those
of_torch = f", and {len(nvidia)} CUDA packages as PyTorch wants them" if nvidia else ""
print(f"{len(found.keys() & pins.keys())} packages as pinned{of_torch}")
PYTHON

the_user() {
  in_image bash -ec '
    [ "$(id -u):$(id -g)" = 10001:10001 ]
    package=$(python -c "import sora_llm; print(sora_llm.__path__[0])")
    for closed in "$package" /opt/venv /opt/sora_llm /etc /workspace/configs; do
      ! touch "$closed/x" 2>/dev/null || { echo "$closed can be written"; exit 1; }
    done
    mkdir -p "$HF_HOME" "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR" outputs/x
    rmdir "$HF_HOME" "$TORCH_EXTENSIONS_DIR" "$TRITON_CACHE_DIR" outputs/x
    ! find / -xdev -perm -o+w -type d ! -perm -1000 2>/dev/null | grep . || exit 1
    echo "$(id -u):$(id -g) writes /cache and /workspace, not the installation"'
}

another_user() { # docker run --user $(id -u):$(id -g): a number without a name and without a home
  store run --user 4711:4711 "$container" -- bash -ec '
    cd /workspace
    [ "$(id -u)" = 4711 ]
    mkdir /cache/of-4711 outputs/of-4711
    rmdir /cache/of-4711 outputs/of-4711
    log=$(mktemp)
    accelerate launch -m sora_llm.train configs/demo.yaml --print-config >"$log" 2>&1 || { cat "$log"; exit 1; }
    rm "$log"
    echo "4711:4711 reads a config and writes /cache and /workspace"'
}

the_compiler() { # the operator that DeepSpeed compiles where processes share a machine without GPUs
  in_image bash -ec 'DS_ACCELERATOR=cpu python -c "
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is not None" >/tmp/op.log 2>&1 || { cat /tmp/op.log; exit 1; }
    rm /tmp/op.log
    find "$TORCH_EXTENSIONS_DIR" -name "*.so" -printf "%p\n" | grep .'
}

a_training() { # the demo: base model and data from Python's documentation, then two processes, ZeRO-2, NF4, export
  in_image bash -ec '
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    {
      python /demo/demo_base.py --out outputs/demo --seconds 15 &&
        tini -s -- accelerate launch --config_file launch/cpu.yaml -m sora_llm.train configs/demo.yaml \
          train.max_steps=12 "evaluation.sample_prompts=[]"
    } >/tmp/train.log 2>&1 || { tail -n 40 /tmp/train.log; exit 1; }
    python -c "
import json
certificate = json.load(open(\"outputs/demo/run/adapter/certificate.json\"))
environment = json.load(open(\"outputs/demo/run/env.json\"))
assert certificate[\"passed\"], certificate
print(environment[\"strategy\"], \"on\", environment[\"num_processes\"], \"processes, 12 steps, adapter verified\")"'
}

# docker stop: tini passes TERM on.  One process ends with 75; of two, accelerate's launcher passes it to both and
# exits with its own code.
a_stop() {
  in_image bash -ec '
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    stopped() { # stopped <run directory> <command>: started, asked to stop after two steps, left with a checkpoint
      local run=outputs/$1 code=0 pid
      shift
      tini -s -- "$@" configs/demo.yaml "output.output_dir=$run" output.logging_steps=1 >/tmp/stop.log 2>&1 &
      pid=$!
      until grep -qs "\"step\": 2," "$run/metrics.jsonl"; do
        kill -0 "$pid" 2>/dev/null || { cat /tmp/stop.log >&2; exit 1; }
        sleep 0.2
      done
      kill -TERM "$pid"
      wait "$pid" || code=$?
      grep -q "\"state\": \"preempted\"" "$run/status.json" || { cat /tmp/stop.log "$run/status.json" >&2; exit 1; }
      ls "$run"/checkpoints/step-*/COMPLETE >/dev/null
      echo "$code"
    }
    one=$(stopped one sora-llm train)
    two=$(stopped two accelerate launch --config_file launch/cpu.yaml -m sora_llm.train)
    [ "$one" = 75 ] || { echo "exit code $one"; exit 1; }
    echo "one process: a checkpoint, exit code $one; two under accelerate: a checkpoint, exit code $two"'
}

another_build() { # code and pyproject.toml have changed, the dependencies have not
  local started=$SECONDS kept new
  echo "CHANGED = True" >>"$context/sora_llm/__init__.py"
  printf '\n[tool.changed]\n' >>"$context/pyproject.toml"
  build "$image-changed" "$folder/build.2.log"
  layers "$image-changed" >"$folder/layers.2"
  kept=$(comm -12 <(cut -f1 "$folder/layers.1" | sort) <(cut -f1 "$folder/layers.2" | sort) | wc -l)
  new=$(grep -vFf <(cut -f1 "$folder/layers.1") "$folder/layers.2" | cut -f2)
  [ "$kept" = $(($(wc -l <"$folder/layers.1") - 1)) ] || { cat "$folder/layers.1" "$folder/layers.2"; return 1; }
  local changed
  changed=$(store from "$image-changed")
  store run "$changed" -- python -c 'import sora_llm; assert sora_llm.CHANGED'
  store rm "$changed" >/dev/null
  echo "one new layer of $new MB, $kept kept, $((SECONDS - started)) s"
}

# ----- the story ------------------------------------------------------------------------------------------------------

if [ "$variant" = cuda ]; then
  torch_index=
else
  torch_index=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
  if [ -n "$torch_index" ] && ! curl -fsSL -m 20 -o /dev/null "$torch_index/torch/" 2>/dev/null; then
    torch_index=file:///mnt/torch-index
  fi
fi

announce "base: a debootstrap system under the name $base"
started=$SECONDS
make_base
seconds_base=$((SECONDS - started))

announce "build: docker/Dockerfile, PyTorch for $variant${torch_index:+, from $torch_index}"
started=$SECONDS
pip_settings
[ "$torch_index" != file:///mnt/torch-index ] || local_torch_index
copy_context
build "$image" "$folder/build.1.log"
seconds_build=$((SECONDS - started))
layers "$image" >"$folder/layers.1"
container=$(store from --volume "$context/launch:/demo:ro" "$image")

announce "checks"
started=$SECONDS
check "the build context holds the sources only" the_build_context
check "user, folder, command and labels" the_configuration
check "no pip settings or secrets in environment and history" no_secrets
check "nothing left over in any layer" no_leftovers
check "docker run IMAGE" the_default_command
check "accelerate launch -m sora_llm.train ..." the_real_command
check "imports" the_imports
check "PyTorch's build" the_torch_build
check "versions of constraints.txt" the_versions
check "not root, and writes only where it should" the_user
check "any other user (--user)" another_user
check "DeepSpeed's operator compiles" the_compiler
if [ "$train" = yes ]; then
  check "training in the image" a_training
  check "docker stop saves a checkpoint" a_stop
fi
check "a change of the code rebuilds one layer" another_build
seconds_checks=$((SECONDS - started))

announce "layers above the base"
awk -F'\t' '{ total += $2; printf "%9.1f MB  %s\n", $2, substr($3, 1, 100) }
  END { printf "%9.1f MB  in all\n", total }' "$folder/layers.1"

announce "result: $variant, $(in_image python --version), $(date -u +%F)"
for line in "${results[@]}"; do
  printf '%-64s %s\n' "${line%%|*}" "${line#*|}"
done
echo "$SECONDS s: base $seconds_base, build $seconds_build, checks $seconds_checks;" \
  "$(du -sh --exclude=pip "$folder" 2>/dev/null | cut -f1) on disk meanwhile"
[ "$failures" = 0 ] || { echo "$failures checks failed"; exit 1; }
echo "all ${#results[@]} checks passed"
