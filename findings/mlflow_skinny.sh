#!/bin/sh
# Three things that mlflow-skinny 3.17.2, the part of MLflow that a training needs, does not tell. It reports how it is
# used, to a server whose name it looks up, unless MLFLOW_DISABLE_TELEMETRY=true (or it takes itself to be in a CI, or
# in pytest). Its store of plain files, which needs nothing else, raises an error now. The one of SQLite needs SQLAlchemy
# and Alembic, which its package does not require; with both no more of MLflow is needed.
#
# Output seen, on Python 3.11, Linux (the names that are looked up, whether or not there is a network):
#   mlflow-skinny 3.17.2 files: MlflowException
#   mlflow-skinny 3.17.2 SQLite alone: UnsupportedModelRegistryStoreURIException
#   mlflow-skinny 3.17.2 SQLite with SQLAlchemy and Alembic: [(0, 1.0)], looks up config.mlflow-telemetry.io
#   mlflow-skinny 3.17.2 the same, MLFLOW_DISABLE_TELEMETRY=true: [(0, 1.0)], looks up none
#
# Needs strace, and a network, or a mirror of PyPI. Exits 1 if any line is another.
#     PYTHON=python3.11 sh findings/mlflow_skinny.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/log.py" <<'LOG'
import sys

from mlflow import MlflowClient

try:
    client = MlflowClient(sys.argv[1])
    run = client.create_run(client.create_experiment(f"e{len(client.search_experiments())}")).info.run_id
    client.log_metric(run, "loss", 1.0, step=0)
    print([(metric.step, metric.value) for metric in client.get_metric_history(run, "loss")])
except Exception as error:
    print(type(error).__name__)
LOG
"${PYTHON:-python3}" -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip mlflow-skinny==3.17.2
unset CI GITHUB_ACTIONS PYTEST_CURRENT_TEST MLFLOW_DISABLE_TELEMETRY MLFLOW_ALLOW_FILE_STORE DO_NOT_TRACK

# log STORE [NAME=VALUE]: what logging to the store comes to
log() {
    store=$1
    shift
    env A=b "$@" strace -f -qq -s 100 -e trace=sendto,sendmmsg,sendmsg -o "$folder/calls" \
        "$folder/venv/bin/python" "$folder/log.py" "$store" 2>/dev/null
}

# names: the names that were looked up, from the bytes of the DNS questions
names() {
    grep -q 'config\\20mlflow-telemetry\\2io' "$folder/calls" && echo config.mlflow-telemetry.io || echo none
}

found=$(
    cd "$folder"
    echo "mlflow-skinny 3.17.2 files: $(log "$folder/mlruns")"
    echo "mlflow-skinny 3.17.2 SQLite alone: $(log "sqlite:///$folder/a.db")"
    $pip sqlalchemy==2.1.9 alembic==1.20.1
    told="$(log "sqlite:///$folder/b.db")"
    echo "mlflow-skinny 3.17.2 SQLite with SQLAlchemy and Alembic: $told, looks up $(names)"
    told="$(log "sqlite:///$folder/c.db" MLFLOW_DISABLE_TELEMETRY=true)"
    echo "mlflow-skinny 3.17.2 the same, MLFLOW_DISABLE_TELEMETRY=true: $told, looks up $(names)"
)
echo "$found"
[ "$found" = "mlflow-skinny 3.17.2 files: MlflowException
mlflow-skinny 3.17.2 SQLite alone: UnsupportedModelRegistryStoreURIException
mlflow-skinny 3.17.2 SQLite with SQLAlchemy and Alembic: [(0, 1.0)], looks up config.mlflow-telemetry.io
mlflow-skinny 3.17.2 the same, MLFLOW_DISABLE_TELEMETRY=true: [(0, 1.0)], looks up none" ]
