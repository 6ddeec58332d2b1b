"""build.sh and profile.sh of a kit: plain commands of the version's own tool, for a device without Python.

Every option goes through `_options`, which refuses one that the version does not have: a script never fails on the
device because an option was removed. Every word that comes from a record goes through shlex.quote.
"""

import shlex
from collections.abc import Sequence

from engines.targets import Target
from engines.tensorrt.records import (
    PLUGIN_LIBRARY,
    SCRIPTED_FORMAT,
    EngineGraph,
    EnginesRecord,
    WeightInput,
    tensor_bytes,
)
from engines.tensorrt.versions import Traits
from graphs import names
from graphs.tf32 import allows_tf32

DECOMPOSABLE = "--decomposableAttentions"
PLACES = {"trtexec": "/usr/src/tensorrt/bin/trtexec", "tensorrt_rtx": "/usr/local/bin/tensorrt_rtx"}


def stem(graph: EngineGraph) -> str:
    """Name of a graph's files: `head`, or `head.<profile>` where a bundle has several profiles."""
    return graph.onnx.file.removeprefix("graphs/").removesuffix(".onnx")


def weight_file(weight: WeightInput) -> str:
    """Where a weight input's bytes lie for the profiler."""
    return f"inputs/weights/{weight.name}.bin"


def extractable(weight: WeightInput) -> bool:
    """Whether the stored bytes are the input's as they are, so that the device can cut them out of the weights."""
    if weight.packing == "words":  # zeros may need bytes behind them
        return sum(source.nbytes for source in weight.sources) == tensor_bytes(weight)
    return all(source.dtype == weight.dtype for source in weight.sources)


def needs_plugins(record: EnginesRecord) -> bool:
    """Whether any engine has a plugin layer."""
    return any(graph.custom_nodes for graph in record.graphs)


def build_script(record: EnginesRecord, target: Target, traits: Traits, *, inner: bool = False) -> str:
    """build.sh. `inner`: there is a folder of unpruned engines inside, which is built too."""
    lines = [
        *_head(target, traits, "Builds the engines in this folder", "./build.sh [graph ...]"),
        *(_PLUGIN.splitlines() if needs_plugins(record) else []),
        *_BUILD.format(tool=traits.tool, format=SCRIPTED_FORMAT, bundle=record.bundle_sha256).splitlines(),
        "",
    ]
    for graph in record.graphs:
        lines += _call("build", stem(graph), _options(traits, _build_options(record, graph, traits)))
    return "\n".join([*lines, *(_INNER.format(script="build.sh") if inner else "").splitlines(), ""])


def profile_script(
    record: EnginesRecord, target: Target, traits: Traits, *, inner: bool = False, inside: str = ""
) -> str:
    """profile.sh. `inside` is the way from this folder to the one that has the weight files: "../" in unpruned/."""
    shared = record.weights == "shared"
    lines = [
        *_head(target, traits, "Measures the engines in this folder", "./profile.sh [graph ...]"),
        *(_NEEDS_PLUGIN.splitlines() if needs_plugins(record) else []),
        *(_WEIGHTS.format(folder=f"{inside}inputs/weights").splitlines() if shared else []),
        *_PROFILE.format(tool=traits.tool).splitlines(),
        "",
    ]
    for graph in record.graphs:
        inputs = ",".join(f"{name}:{file.file}" for name, file in graph.samples.items())
        weights = ",".join(f"{weight.name}:{inside}{weight_file(weight)}" for weight in graph.weight_inputs)
        arguments = _options(traits, _profile_options(record, graph, target, traits))
        lines += _call("profile", stem(graph), [shlex.quote(inputs), shlex.quote(weights), *arguments])
    return "\n".join([*lines, *(_INNER.format(script="profile.sh") if inner else "").splitlines(), ""])


def weights_script(record: EnginesRecord, inside: str = "") -> str:
    """weights.sh, sourced by profile.sh: cuts the weight inputs out of the safetensors files."""
    lines = ["# weight FILE (SOURCE OFFSET BYTES) ...: FILE becomes these parts of the sources, one after another."]
    seen: dict[str, WeightInput] = {
        weight_file(weight): weight for graph in record.graphs for weight in graph.weight_inputs if extractable(weight)
    }
    for file, weight in sorted(seen.items()):
        lines.append(f"weight {shlex.quote(inside + file)} \\")
        parts = [f"    {shlex.quote(source.file)} {source.offset} {source.nbytes}" for source in weight.sources]
        lines.append(" \\\n".join(parts))
    return "\n".join([*lines, ""])


# -- options ---------------------------------------------------------------------------------------------------------


def _build_options(record: EnginesRecord, graph: EngineGraph, traits: Traits) -> list[str]:
    engine = shlex.quote(f"{stem(graph)}.engine.partial")
    options = [f"--onnx={shlex.quote(graph.onnx.file)}", f"--saveEngine={engine}", "--skipInference"]
    options.append("--profilingVerbosity=detailed")
    if traits.flavour == "rtx":
        options.append(f"--computeCapabilities={record.compute_capability.replace('.', '')}")
    else:
        options.append("--timingCacheFile=timing.cache")
        if not traits.strongly_typed_only:
            options.append("--stronglyTyped")
        if not allows_tf32(record.precision):
            options.append("--noTF32")
    attends = names.parse_graph(graph.name).kind in ("vision", "prefill", "whole")
    if record.opset >= 23 and attends and DECOMPOSABLE in traits.options:
        options.append(f"{DECOMPOSABLE}='*'")  # as in builder.py: not every type and head size has a fused kernel
    if graph.custom_nodes:
        options.append('--dynamicPlugins="$PLUGINS"')
    return options


def _profile_options(record: EnginesRecord, graph: EngineGraph, target: Target, traits: Traits) -> list[str]:
    name = shlex.quote(stem(graph))
    options = [f"--loadEngine={name}.engine", f"--exportTimes=profile/{name}.times.json"]
    options += [f"--exportProfile=profile/{name}.profile.json", f"--exportLayerInfo=profile/{name}.layers.json"]
    options += ["--warmUp=500", "--duration=5", "--iterations=50"]
    if not traits.lean_timing:  # later versions do so by themselves
        options += ["--noDataTransfers", "--useCudaGraph", "--useSpinWait", "--separateProfileRun"]
    if record.weights == "shared" and target.unified_memory:
        options.append("--useManagedMemory")  # one copy of the weights in place of one for the host, one for the GPU
    if graph.custom_nodes:
        options.append('--dynamicPlugins="$PLUGINS"')
    return options


def _options(traits: Traits, options: Sequence[str]) -> list[str]:
    names = {option.split("=")[0] for option in [*options, "--loadInputs", "--help"]}
    assert names <= traits.options, f"{traits.tool} {traits.version} has no {', '.join(sorted(names - traits.options))}"
    assert not names & traits.useless, f"{', '.join(sorted(names & traits.useless))} do nothing in {traits.version}"
    return list(options)


def _call(function: str, name: str, arguments: Sequence[str]) -> list[str]:
    lines = [f"{function} {shlex.quote(name)}", *(f"    {argument}" for argument in arguments)]
    return [line + (" \\" if number < len(lines) - 1 else "") for number, line in enumerate(lines)]


# -- the scripts' own functions --------------------------------------------------------------------------------------


def _head(target: Target, traits: Traits, what: str, usage: str) -> list[str]:
    digits = "".join(f"{part:02}" if place else str(part) for place, part in enumerate(traits.number[:2]))
    tool = traits.tool
    return _HEAD.format(
        what=what, usage=usage, version=traits.version, title=target.title, sm=target.sm, tool=tool, place=PLACES[tool],
        variable=tool.upper(), digits=digits, machine=target.machine, library=PLUGIN_LIBRARY,
    ).splitlines()  # fmt: skip


_HEAD = """\
#!/usr/bin/env bash
# {what} with {tool} of TensorRT {version}, for {title} (sm_{sm}). Needs no Python.
#   {usage}        all graphs if none is named
# {variable}: the tool, if it is not on PATH.  PLUGINS: the plugin library, if it is not {library}.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

die() {{
    printf 'error: %s\\n' "$@" >&2
    exit 3
}}

TOOL=${{{variable}:-$(command -v {tool} || echo {place})}}
PLUGINS=${{PLUGINS:-{library}}}
GRAPHS=" $* "
[ -x "$TOOL" ] || die "no {tool}: $TOOL" "do this: {variable}=/path/to/{tool} $0"
banner=$("$TOOL" --help 2>&1 | grep -o -m1 'TensorRT v[0-9]*' || true)
case "${{banner#*v}}" in
    {digits}* | "") ;;
    *) die "$TOOL is of ${{banner}}" "wanted: TensorRT {version}, for which these graphs were prepared" ;;
esac

wanted() {{
    [ "$GRAPHS" = "  " ] || case "$GRAPHS" in *" $1 "*) ;; *) return 1 ;; esac
}}
"""

_NEEDS_PLUGIN = """\
[ -f "$PLUGINS" ] || die "no plugin library $PLUGINS" "do this: plugins/build.sh"
"""
_PLUGIN = '[ -f "$PLUGINS" ] || plugins/build.sh\n' + _NEEDS_PLUGIN

_BUILD = """\

digest() {{ sha256sum < "$1" | cut -d' ' -f1; }}

# json TEXT: as a JSON string.
json() {{
    local text=${{1//\\\\/\\\\\\\\}}
    text=${{text//\\"/\\\\\\"}}
    printf '"%s"' "${{text//[[:cntrl:]]/?}}"
}}

version=${{banner##*v}}
[ -z "$version" ] || version=$((version / 10000)).$((version / 100 % 100)).$((version % 100))

# facts GRAPH OPTION ...: lines of an engine's record that tell whether it is still what would be built.
facts() {{
    local graph=$1 option plugin=null options=
    shift
    for option in "$@"; do
        case "$option" in
            --dynamicPlugins=*)
                plugin=$(json "$(digest "${{option#*=}}")")
                option=--dynamicPlugins=${{option##*/}} # a record names no folder of this machine
                ;;
        esac
        options+=${{options:+, }}$(json "$option")
    done
    printf ' "bundle_sha256": "{bundle}",\\n'
    printf ' "graph_sha256": "%s",\\n "plugin_sha256": %s,\\n' "$(digest "$graph")" "$plugin"
    printf ' "tensorrt": "%s",\\n "options": [%s],\\n' "$version" "$options"
}}

# current NAME FACTS: whether NAME.engine need not be built: its record says so, or `btp-export build` made it.
current() {{
    local engine=$1.engine record
    [ -s "$engine" ] || return 1
    if [ -f "$engine.json" ]; then
        record=$(cat "$engine.json")
        case "$record" in *"$2"*"\\"size\\": $(stat -c %s "$engine"),"*) return 0 ;; *) return 1 ;; esac
    fi
    [ "$engine" -nt "graphs/$1.onnx" ] && grep -q "\\"file\\": \\"$engine\\"" engines.json
}}

# build NAME OPTION ...: an engine appears whole or not at all, and after it NAME.engine.json, by which
# `btp-export build` adopts it.
build() {{
    local name=$1 engine=$1.engine known start=$SECONDS
    shift
    wanted "$name" || return 0
    known=$(facts "graphs/$name.onnx" "$@")
    if current "$name" "$known"; then
        echo "$name: up to date"
        return 0
    fi
    mkdir -p logs
    echo "$name: building, log in logs/$name.build.log"
    rm -f "$engine.partial"
    if ! "$TOOL" "$@" > "logs/$name.build.log" 2>&1; then
        rm -f "$engine.partial"
        die "{tool} could not build $name, the end of logs/$name.build.log:" "$(tail -n 5 "logs/$name.build.log")"
    fi
    [ -s "$engine.partial" ] || die "{tool} said it was done and wrote no engine for $name (out of memory?)"
    rm -f "$engine.json"
    mv "$engine.partial" "$engine"
    {{
        printf '{{\\n "format": "{format}",\\n "engine": "%s",\\n%s\\n' "$engine" "$known"
        printf ' "size": %s,\\n "sha256": "%s",\\n' "$(stat -c %s "$engine")" "$(digest "$engine")"
        printf ' "seconds": %s\\n}}\\n' $((SECONDS - start))
    }} > "$engine.json.partial"
    mv "$engine.json.partial" "$engine.json"
}}
trap 'rm -f ./*.engine.partial ./*.engine.json.partial' EXIT"""

_WEIGHTS = """\

# The weights are network inputs: their bytes are cut out of the safetensors files once. WEIGHTS=random leaves that out
# and measures with random numbers.
weight() {{
    local file=$1
    shift
    [ ! -s "$file" ] || return 0
    while [ $# -gt 0 ]; do
        dd if="$1" bs=4M iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none >> "$file.partial"
        shift 3
    done
    mv "$file.partial" "$file"
}}
mkdir -p {folder}
rm -f {folder}/*.partial
trap 'rm -f {folder}/*.partial' EXIT
# shellcheck source=/dev/null
[ "${{WEIGHTS:-}}" = random ] || . ./weights.sh
"""

_PROFILE = """\

# profile NAME INPUTS WEIGHTS OPTION ...
profile() {{
    local name=$1 inputs=$2 weights=$3
    shift 3
    wanted "$name" || return 0
    [ -s "$name.engine" ] || die "no engine for $name" "do this: ./build.sh $name"
    [ "${{WEIGHTS:-}}" != random ] || weights=
    [ -z "$weights" ] || inputs=${{inputs:+$inputs,}}$weights
    mkdir -p logs profile
    echo "$name: measuring"
    rm -f "profile/$name.clock"
    [ -z "$GPU" ] || {{
        clocks "$name" &
        sampler=$!
    }}
    "$TOOL" "$@" ${{inputs:+"--loadInputs=$inputs"}} > "logs/$name.profile.log" 2>&1 ||
        die "{tool} could not run $name, the end of logs/$name.profile.log:" "$(tail -n 5 "logs/$name.profile.log")"
    [ -z "$sampler" ] || {{
        kill "$sampler"
        wait "$sampler" 2> /dev/null || true
        sampler=
        sort -n "profile/$name.clocks" | tail -n 1 > "profile/$name.clock" # the highest: it idles while files are read
        rm -f "profile/$name.clocks"
    }}
    grep -q '^sms:' profile/system.txt ||
        sed -n 's/.*Selected Device: /device: /p; s/.*SMs: /sms: /p' "logs/$name.profile.log" >> profile/system.txt
}}

# clocks NAME: the GPU's clock in Hz, twice a second until it is ended.
clocks() {{
    while cat "$GPU/cur_freq"; do sleep 0.5; done > "profile/$1.clocks"
}}

# words FILE: its text on one line; nothing where there is no such file, or only root may read it.
words() {{
    {{ tr '\\0\\n' '  ' < "$ROOT$1"; }} 2> /dev/null || true
}}

# mode: the power mode, asked of nvpmodel or read from its files, which need no rights.
mode() {{
    local number modes=$ROOT/etc/nvpmodel.conf
    if nvpmodel -q 2> /dev/null | tr '\\n' ' ' | grep .; then return; fi
    number=$(words /var/lib/nvpmodel/status | sed -n 's/.*pmode:0*\\([0-9][0-9]*\\).*/\\1/p')
    [ -z "$number" ] ||
        sed -n "s/.*POWER_MODEL ID=$number NAME=\\([^ >]*\\).*/NV Power Mode: \\1/p" "$modes" 2> /dev/null ||
            echo "$number"
}}

ROOT=${{BTP_ROOT:-}} # where /proc, /sys and /etc are
GPU= sampler=
for folder in "$ROOT"/sys/class/devfreq/*gpu* "$ROOT"/sys/class/devfreq/*ga10b*; do
    if [ -r "$folder/cur_freq" ] && [ -z "$GPU" ]; then GPU=$folder; fi
done
trap '[ -z "$sampler" ] || kill "$sampler"; rm -f profile/*.clocks' EXIT

# Power mode, clocks, driver and versions belong beside every number.
mkdir -p profile
{{
    echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "tool: $banner"
    echo "kernel: $(uname -srm)"
    echo "model: $(words /proc/device-tree/model)"
    echo "module: $(words /proc/device-tree/compatible)"
    echo "memory: $(words /proc/meminfo | sed 's/ kB.*/ kB/; s/.*: *//')"
    echo "l4t: $(words /etc/nv_tegra_release | sed 's/, GCID.*//')"
    [ -z "$GPU" ] || echo "gpu_clock_max_hz: $(words "${{GPU#"$ROOT"}}/max_freq")"
    echo "memory_clock_hz: $(words /sys/kernel/debug/bpmp/debug/clk/emc/rate)"
    echo "nvpmodel: $(mode)"
    echo "jetson_clocks: $(jetson_clocks --show 2> /dev/null | tr '\\n' ' ' || true)"
    fields=name,driver_version,clocks.sm,clocks.mem,power.limit
    echo "nvidia_smi: $(nvidia-smi --query-gpu=$fields --format=csv,noheader 2> /dev/null || true)"
    echo "weights: ${{WEIGHTS:-real}}"
}} > profile/system.txt"""


_INNER = """\

# The model without pruning, to be compared with.
unpruned/{script} "$@"
"""
