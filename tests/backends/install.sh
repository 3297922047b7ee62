#!/usr/bin/env bash
# Puts the telemetry backends the tests send to into .backends/, from the package registries only.
#
#     tests/backends/install.sh [--with-mlflow] [--with-browser]
#
# One line per backend says "ready" or "skipped because ..."; a backend that cannot be had is no failure, its tests
# skip with a reason. What is there already, in the version asked for, is left alone. BACKENDS_DIR puts it elsewhere.
# shellcheck disable=SC2329 # the functions that install are called by name, in a shell of their own
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${BACKENDS_DIR:-$here/../../.backends}
builder=go.opentelemetry.io/collector/cmd/builder@v0.161.0
jaeger=github.com/jaegertracing/jaeger
jaeger_version=v1.76.0 # this module version is Jaeger 2.13.0: the v2 program lives in cmd/jaeger of the v1 module path
jaeger_name=v2.13.0
mockotlp=@elastic/mockotlpserver@0.10.0
mlflow=mlflow==3.17.2
limit=900 # seconds for one backend; each takes a few minutes on two cores

with_mlflow=''
with_browser=''
for option in "$@"; do
    case $option in
        --with-mlflow) with_mlflow=yes ;;
        --with-browser) with_browser=yes ;;
        *) echo "usage: $0 [--with-mlflow] [--with-browser]" >&2; exit 2 ;;
    esac
done

mkdir -p "$target" || exit 1
target=$(cd "$target" && pwd)
exec 9>"$target/.lock" && flock 9 # two runs at once would build everything twice, into the same place
scratch=$(mktemp -d "$target/build.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# ensure NAME VERSION COMMAND NEEDS...: runs COMMAND in an empty directory unless NAME.stamp already names VERSION.
# The stamp is what the tests look for: it goes first and comes back last, so nothing half installed is ever used.
ensure() {
    local name=$1 version=$2 command=$3 program
    shift 3
    if [[ $(cat "$target/$name.stamp" 2>/dev/null) == "$version" ]]; then
        echo "$name: ready"
        return
    fi
    rm -f "$target/$name.stamp"
    for program in "$@"; do
        if ! command -v "$program" >/dev/null; then
            echo "$name: skipped because $program is not installed"
            return
        fi
    done
    # shellcheck disable=SC2163 # the function that is named in the variable
    export -f "$command"
    mkdir "$scratch/$name" && cd "$scratch/$name" || return
    attempt "$name" timeout -k 10 "$limit" bash -eo pipefail -c "$command" && echo "$version" >"$target/$name.stamp"
    cd "$target" && rm -rf "${scratch:?}/$name"
}

# attempt NAME COMMAND...: runs it quietly and says how it went; the log stays only when it failed.
attempt() {
    local name=$1 began=$SECONDS log=$target/$1.log
    shift
    if "$@" >"$log" 2>&1 </dev/null 9>&-; then
        echo "$name: ready (installed in $((SECONDS - began)) s)"
        rm -f "$log"
    else
        echo "$name: skipped because its installation failed: $(reason "$log") (all of it: $log)"
        return 1
    fi
}

reason() {
    { grep -v downloading "$1" | grep -iE 'error|fail|forbidden|not found|denied|disabled|could not|cannot' ||
        tail -n 1 "$1"; } | head -n 1 | cut -c1-200
}

go_flags() {
    GOFLAGS="$(go env GOFLAGS) -trimpath"
    export GOFLAGS GOWORK=off
}

build_collector() {
    go_flags
    GOBIN=$PWD go install -ldflags '-s -w' "$builder"
    cp "$here/collector.yaml" .
    ./builder --config collector.yaml --ldflags '-s -w'
    mkdir -p "$target/collector"
    mv build/otelcol "$target/collector/"
}

# `go install jaeger@version` refuses: Jaeger's go.mod holds a replace directive. A module of our own that requires it
# may build its main package. Jaeger's go.sum comes with it, because the checksum database no longer knows every module.
build_jaeger() {
    go_flags
    directory=$(go mod download -json "$jaeger@$jaeger_version" | tee /dev/stderr | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    go mod init localhost/jaeger
    cp "$directory/go.sum" go.sum
    chmod u+w go.sum
    go get "$jaeger/cmd/jaeger@$jaeger_version"
    go build -ldflags "-s -w -X $jaeger/internal/version.latestVersion=$jaeger_name" -o jaeger "$jaeger/cmd/jaeger"
    mkdir -p "$target/jaeger"
    mv jaeger "$target/jaeger/"
}

install_mockotlp() {
    rm -rf "$target/npm"
    mkdir "$target/npm"
    npm install --prefix "$target/npm" --ignore-scripts --no-audit --no-fund --no-update-notifier "$mockotlp" axe-core@4
}

install_mlflow() {
    rm -rf "$target/mlflow"
    python3 -m venv "$target/mlflow"
    "$target/mlflow/bin/pip" install --quiet --disable-pip-version-check "$mlflow"
}

install_debian() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# debian NAME PROGRAM PACKAGE: a program on this machine, else Debian's package of it.
debian() {
    if PATH=$PATH:/usr/sbin command -v "$2" >/dev/null; then
        echo "$1: ready"
    elif ! command -v apt-get >/dev/null; then
        echo "$1: skipped because $2 is not installed and there is no apt-get"
    elif [[ $(id -u) != 0 ]]; then
        echo "$1: skipped because $2 is not installed and only root can install it"
    else
        attempt "$1" timeout -k 10 "$limit" bash -eo pipefail -c 'install_debian "$@"' install "$3"
    fi
}

export here target builder jaeger jaeger_version jaeger_name mockotlp mlflow
export -f go_flags install_debian
go=$(go env GOVERSION 2>/dev/null)
ensure collector "$(sha256sum "$here/collector.yaml" | cut -c1-16) $builder $go" build_collector go
ensure jaeger "$jaeger_version $go" build_jaeger go
ensure mockotlp "$mockotlp axe-core@4" install_mockotlp npm node
debian nginx nginx nginx
if [[ $with_mlflow ]]; then
    ensure mlflow "$mlflow $(python3 --version)" install_mlflow python3
fi
if [[ $with_browser ]]; then
    debian chromium chromium chromium
    debian chromedriver chromedriver chromium-driver
fi
exit 0
