# Two commands do all the set-up on a fresh Debian or Ubuntu machine: `make demo` and `make test`.

SHELL := /bin/bash
# A Go that scripts/setup.sh had to fetch comes first. go.mod says which one builds flint.
export PATH := $(CURDIR)/build/toolchain/bin:$(PATH)
export GOTOOLCHAIN ?= auto
# Go asks git, too, which refuses a checkout of another user's.
export GOFLAGS += -buildvcs=false
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo development)
LDFLAGS := -s -w -X main.version=$(VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
# Root makes bridges, namespaces and taps; everything else runs as you.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$$PATH")
STATE := $(CURDIR)/build/state

.PHONY: build chaos demo test test-kvm test-arm64 test-images filesystem lint bench soak fuzz clean setup kernel help

build: setup ## both programs, static, into build/
	$(GOBUILD) -o build/flint ./cmd/flint
	$(GOBUILD) -o build/flint-agent ./cmd/flint-agent

setup:
	@scripts/setup.sh

demo: build ## a real workflow job in a real microVM, from nothing; ARGS=--fail makes a job fail
	@$(SUDO) build/flint demo --state-dir '$(STATE)' $(ARGS)

test: build ## the tests, with the race detector; boots real VMs
	@scripts/test.sh

test-kvm: build ## what needs a real /dev/kvm, and what systemd does, in emulated hosts; HOST=systemd or HOST=kvm takes one
	@# FLINT_TEST_FIRECRACKER_DIR=DIR tries Firecracker too
	@scripts/test-kvm.sh $(HOST)

test-arm64: setup ## boots arm64 guests by emulation
	@scripts/test-arm64.sh

test-images: build ## the images that flint ships, in real VMs, with jobs that use docker; images of other sources; real engines
	@scripts/test-images.sh

lint: setup
	@scripts/lint.sh

bench: build ## medians, never verdicts
	@scripts/bench.sh

soak: setup ## a coordinator, always restarted, against a GitHub that misbehaves; minutes. SEED=7 repeats one, RUNS=3 makes more
	@SEED='$(SEED)' RUNS='$(RUNS)' LOG='$(LOG)' scripts/soak.sh

chaos: setup ## 1000 runners whose coordinators are killed at random: what is lost, what is left; minutes. CUTS=100 SEED=7
	@set -o pipefail; FLINT_TEST_CUTS='$(or $(CUTS),1000)' FLINT_TEST_SEED='$(SEED)' \
		go test ./internal/host/crashtest -run TestRandomCuts -count=1 -timeout 1h -v | grep -v '^ *\(=== \|--- PASS\)'

fuzz: setup ## every fuzz target, 20 s each
	@scripts/fuzz.sh

filesystem: build ## images/runner as a file to boot from, build/rootfs/rootfs.ext4; BASE=docker.io/library/debian:13
	@$(SUDO) build/flint image build --state-dir '$(STATE)' --local-base $(if $(BASE),--build-arg 'BASE=$(BASE)') \
		--output build/rootfs/rootfs.ext4 images/runner

# VERSION is flint's own unless it is said to make.
kernel: setup ## a kernel without modules from the distribution's source, build/kernel/vmlinux; VERSION=6.1 ARCH=arm64 JOBS=2
	@ARCH='$(ARCH)' JOBS='$(JOBS)' VERSION='$(if $(findstring command,$(origin VERSION)),$(VERSION))' images/kernel/build.sh

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

clean:
	$(SUDO) rm -rf build
