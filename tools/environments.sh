# Functions for the scripts that make environments: find a Python, and install packages.
#
# INSTALLER is uv or pip. The default is uv, which is several times as fast, unless only pip is
# configured to use an index other than the public one: uv does not read pip's configuration.

requirements=tools/requirements

is_usable() {
    # Run it: a pyenv shim that is not activated is on PATH, but fails when called.
    "$1" -c 'import sys, venv, ensurepip
sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Print the first of $PYTHON, python3.12, python3.13, python3 and pyenv's versions that is usable.
find_python() {
    local candidate versions
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    versions=$(pyenv root 2>/dev/null)/versions || versions=$HOME/.pyenv/versions
    for candidate in "$versions"/3.1[23]*/bin/python; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.12 or 3.13 with venv was found: install one (Debian, Ubuntu:" \
        "apt-get install python3.12 python3.12-venv), or set PYTHON= to one." >&2
    return 1
}

choose_installer() {
    local python=$1
    installer=${INSTALLER:-uv}
    case $installer in
        uv | pip) ;;
        *)
            echo "INSTALLER=$installer: expected uv or pip." >&2
            return 1
            ;;
    esac
    if [ -z "${INSTALLER:-}${UV_DEFAULT_INDEX:-}${UV_INDEX:-}${UV_INDEX_URL:-}${UV_NO_INDEX:-}" ] &&
        "$python" -m pip config list 2>/dev/null | grep -Eq '\.(index-url|no-index)='; then
        echo "pip is configured with an index: pip installs (INSTALLER=uv with UV_DEFAULT_INDEX= is faster)"
        installer=pip
    fi
}

# begin_environment DIRECTORY: make it if it is missing, and install the pinned uv and setuptools.
begin_environment() {
    local venv=$1 python
    # An interrupted set-up may leave half a package that looks complete. Starting over is cheap, as
    # downloads are in the installer's cache.
    if [ -e "$venv/unfinished" ]; then
        echo "$venv was not finished: starting over"
        rm -rf "$venv"
    fi
    if ! is_usable "$venv/bin/python"; then
        python=$(find_python)
        echo "making $venv with $("$python" --version) ($python)"
        rm -rf "$venv"
        mkdir -p "$venv"
        touch "$venv/unfinished"
        "$python" -m venv "$venv"
    fi
    choose_installer "$venv/bin/python"
    install_by_pip "$venv" --constraint "$requirements/dev.txt" uv setuptools
    uv=$venv/bin/uv
}

# Print the folder that holds the packages of an environment.
site_packages() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# share_packages DIRECTORY VENV: let DIRECTORY see VENV's packages after its own.
share_packages() {
    local shared
    shared=$(cd "$(site_packages "$2")" && pwd)
    # addsitedir rather than the bare path: it also reads the .pth files there (this package's own).
    echo "import site; site.addsitedir('$shared')" >"$(site_packages "$1")/shared.pth"
}

# Output goes to a file: with --quiet pip hides the reason for some errors (such as an index that it
# cannot reach), and without it prints hundreds of lines.
install_by_pip() {
    local venv=$1 log=$1/pip.log
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        "${@:2}" >"$log" 2>&1 || {
        grep '^WARNING: Retrying' "$log" | tail -n 1 >&2 || true
        grep '^ *ERROR' "$log" >&2 || true
        echo "pip could not install into $venv: see its output in $log" >&2
        return 1
    }
}

# install DIRECTORY ARGUMENT...: take only options that `uv pip install` and `pip install` share.
install() {
    local venv=$1 quiet=--quiet compile=
    shift
    if [ "$installer" = pip ]; then
        install_by_pip "$venv" "$@"
        return
    fi
    [ ! -t 2 ] || quiet= # show uv's progress bars on a terminal
    # If Python may not keep the bytecode of what it imports, every process would compile it again.
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile-bytecode
    "$uv" pip install $quiet $compile --python "$venv/bin/python" "$@" || {
        echo "uv could not install into $venv. uv reads its own configuration (UV_DEFAULT_INDEX," \
            "SSL_CERT_FILE, HTTPS_PROXY and so on); INSTALLER=pip uses pip with pip's." >&2
        return 1
    }
}

finish_environment() {
    rm -f "$1/unfinished"
    echo "$1 is ready after $SECONDS s"
}
