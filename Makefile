# One word per job; each installs what it needs, once. Run as root on Debian 12: make demo, make test.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test soak check bench bench-cni setup setup-demo install uninstall clean

# Where python3 comes from matters: the venv must outlive the shell's own ideas of Python.
SYSTEM_PYTHON := /usr/bin/python3
PYTHON := .venv/bin/python
PIP := .venv/bin/pip --disable-pip-version-check --quiet

# Where `make install` puts things: a virtualenv, the command that systemd finds on its PATH, the unit.
PREFIX ?= /opt/towpath
BINDIR ?= /usr/local/bin
UNITDIR ?= /etc/systemd/system

# thing that must be there : Debian package that brings it
DEMO_DEBS := $(SYSTEM_PYTHON):python3 /usr/lib/python3.11/ensurepip:python3-venv ip:iproute2 nft:nftables
TEST_DEBS := iptables:iptables /usr/lib/cni/bridge:containernetworking-plugins podman:podman containerd:containerd \
  runc:runc /bin/busybox:busybox-static cc:gcc /usr/include/stdio.h:libc6-dev curl:curl \
  strace:strace conntrack:conntrack

help:
	@echo "make demo       see it work: a node in namespaces of its own, workloads, a published port"
	@echo "make test       the whole test suite (root; under ten minutes on two cores)"
	@echo "make install    onto this machine: $(PREFIX), $(BINDIR)/towpath, towpath.service; make uninstall takes it away"
	@echo "make check      formatting, lint, types, floors"
	@echo "make soak       a thousand cycles of ADD, DEL and kill -9"
	@echo "make bench      every benchmark; make bench-cni only this part; results in build/bench"
	@echo "make setup      what all of these need; make clean takes away what they made here"

build:
	@mkdir -p build

build/debs-demo: Makefile .ci/debs | build
	@.ci/debs $(DEMO_DEBS)
	@touch $@

build/debs-test: Makefile .ci/debs build/debs-demo | build
	@.ci/debs $(TEST_DEBS)
	@touch $@

.venv/.demo: setup.cfg pyproject.toml | build/debs-demo
	@echo "==> Python packages into .venv"
	@test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv .venv
	@$(PIP) install --editable '.[lab]'
	@touch $@

.venv/.test: .venv/.demo | build/debs-test
	@echo "==> Python packages of the tests into .venv"
	@$(PIP) install --editable '.[lab,test]'
	@touch $@

setup-demo: .venv/.demo

setup: .venv/.test

demo: setup-demo
	@$(PYTHON) -m integration.demo

check: setup
	@echo "==> format";  .venv/bin/ruff format --check .
	@echo "==> lint";    .venv/bin/ruff check .
	@echo "==> types";   .venv/bin/mypy
	@echo "==> floors";  .venv/bin/pytest -q tests/test_floors.py

test: setup
	@echo "==> tests";   .venv/bin/pytest -q -m "not soak" tests integration

soak: setup
	@echo "==> soak";    TOWPATH_CYCLES=$${TOWPATH_CYCLES:-1000} .venv/bin/pytest -q -s -m soak --timeout 3600 tests integration

bench: bench-cni

bench-cni: setup
	@$(PYTHON) -m integration.bench.cni $(BENCH_FLAGS)

# build/lib goes first: setuptools would pack modules into the wheel that are no longer in the tree.
install: build/debs-demo
	@echo "==> towpath into $(PREFIX)"
	@test -x $(PREFIX)/bin/python || $(SYSTEM_PYTHON) -m venv $(PREFIX)
	@rm -rf build/lib build/bdist.*
	@$(PREFIX)/bin/pip --disable-pip-version-check --quiet install --upgrade .
	@install -d $(BINDIR) $(UNITDIR)
	@ln -sfn $(PREFIX)/bin/towpath $(BINDIR)/towpath
	@install -m 644 units/towpath.service $(UNITDIR)/towpath.service
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo "installed. Start it: systemctl enable --now towpath"

# The agent's tables in /var/lib/towpath and CNI executables stay: see `towpath cni uninstall DIR`.
uninstall:
	@if [ -d /run/systemd/system ] && [ -e $(UNITDIR)/towpath.service ]; then systemctl disable --now towpath; fi
	rm -rf $(PREFIX) $(BINDIR)/towpath $(UNITDIR)/towpath.service
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

clean:
	rm -rf build .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
