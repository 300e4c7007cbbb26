# To be sourced. torch without CUDA, which is a tenth of the size, where there is no GPU that could use the rest.
#
# The package index has CUDA builds for Linux only under the plain name; CPU builds ("2.13.0+cpu") are in an index of PyTorch's own,
# see "Start locally" on pytorch.org. An index or a folder that pip is configured for (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) is asked
# first. TORCH_CPU_INDEX names another one; empty, none is asked. On macOS and Windows the package index has the CPU build.

cpu_index=${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
patience=(--retries 1 --timeout 30)

wants_cpu_torch() { [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; }

cpu_torch() {  # cpu_torch VERSION PIP INSTALL ...: fails where that is not wanted, or not to be had
    local wanted="torch==$1+cpu"; shift
    wants_cpu_torch || return 1
    "$@" "$wanted" 2>/dev/null && return
    [ -n "$cpu_index" ] && "$@" "${patience[@]}" --index-url "$cpu_index" "$wanted" 2>/dev/null
}

newest_cpu_torch() {  # newest_cpu_torch PIP INSTALL ...: so that a later upgrade finds nothing newer on the package index
    wants_cpu_torch && [ -n "$cpu_index" ] && "$@" "${patience[@]}" --upgrade --index-url "$cpu_index" torch 2>/dev/null
}
