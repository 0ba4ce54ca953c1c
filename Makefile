# crivm. `make help` lists the targets. As root on Debian 12 or 13: `make demo` runs a pod, `make test` passes the tests;
# both install and build what they need below build/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BUILD   := $(CURDIR)/build
BIN     := $(BUILD)/bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.1.0-dev)
# Pure Go: no C headers are needed to build. The tags choose Go's OpenPGP and leave out storage drivers that need C libraries.
TAGS    := containers_image_openpgp,exclude_graphdriver_btrfs
export CGO_ENABLED := 0
export GOFLAGS := -trimpath -tags=$(TAGS)
# What is unpacked below build/ is no part of this module.
$(shell mkdir -p $(BUILD) && echo 'module build' > $(BUILD)/go.mod)
LDFLAGS := -s -w -X main.version=$(VERSION)

# $(call tested,NAME,COMMAND) runs tests and keeps what they print; what failed is printed once more at the end, without logs in between.
comma := ,
tested = $(2) 2>&1 | tee $(BUILD)/$(1).log || { printf '\nfailed, from %s:\n' $(BUILD)/$(1).log; \
	  grep -E '^ *--- FAIL|^ +[a-z0-9_]+_test\.go:[0-9]+: |^panic: |^WARNING: DATA RACE|^FAIL' $(BUILD)/$(1).log | cut -c1-400 | head -n 80; exit 1; }

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: all
all: build guest ## everything that is installed on a node

.PHONY: build
build: ## crivm and crivm-agent, into build/bin
	go build -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/crivm ./cmd/crivm-agent

.PHONY: provision
provision: ## Debian packages, guest kernel, crictl, critest, CNI plugins, test images (as root)
	go run ./integration/cmd/provision packages compiler kernel crictl critest ginkgo cni images

.PHONY: guest
guest: build provision ## guest kernel and initramfs, into build/guest
	guest/crun/build.sh $(BIN)/crun $(BUILD)/crun || echo "no static crun: the guest gets the distribution's, which starts more slowly"
	$(BIN)/crivm guest build --kernel "$$(ls $(BUILD)/kernel/boot/vmlinuz-*-amd64)" --modules "$$(ls -d $(BUILD)/kernel/lib/modules/*-amd64)" \
	  --agent $(BIN)/crivm-agent --output $(BUILD)/guest

.PHONY: guest-kernel
guest-kernel: build provision ## optional: a guest image with a kernel for the purpose, into build/guest-small (docs/guest-kernel.md)
	go run ./integration/cmd/provision kernelbuild
	guest/kernel/build.sh $(BUILD)/kernel-small/vmlinux $(BUILD)/kernel-small/work
	guest/crun/build.sh $(BIN)/crun $(BUILD)/crun || echo "no static crun: the guest gets the distribution's, which starts more slowly"
	$(BIN)/crivm guest build --kernel $(BUILD)/kernel-small/vmlinux --modules none --agent $(BIN)/crivm-agent --output $(BUILD)/guest-small

.PHONY: demo
demo: guest ## a pod in a microVM, driven by crictl (as root)
	go build -o $(BIN)/demo ./integration/cmd/demo
	$(BIN)/demo --build $(BUILD)

.PHONY: test
test: guest lint test-unit test-race test-integration ## all tests (as root; boots real VMs)

.PHONY: test-unit
test-unit: ## the fast part: no VM; what needs root or CNI plugins (make provision) is skipped aloud without them
	$(call tested,test-unit,go test -timeout 20m ./...)

.PHONY: test-race
test-race: ## the fast part under the race detector (needs a C compiler)
	$(call tested,test-race,CGO_ENABLED=1 go test -tags=$(TAGS)$(comma)libsqlite3 -race -count=1 -timeout 30m ./...)

.PHONY: test-integration
test-integration: guest ## real VMs, CNI plugins, registry, crictl (as root)
	$(call tested,test-integration,go test -tags=$(TAGS)$(comma)integration -count=1 -timeout 60m -p 1 $$(git grep -l '^//go:build integration' -- '*_test.go' | xargs -n 1 dirname | sort -u | grep -vx server | sed 's,^,./,'))
	$(call tested,test-server,go test -tags=$(TAGS)$(comma)integration -count=1 -timeout 20m -run 'Real$$' ./server) # its other tests are test-unit's

.PHONY: soak
soak: guest ## ten minutes of random kills on real VMs, not part of test (as root; SOAKFLAGS="-duration 1h -seed 7 -pods 4")
	go build -o $(BIN)/soak ./integration/soak
	$(BIN)/soak -build $(BUILD) $(SOAKFLAGS)

.PHONY: conformance
conformance: guest ## critest on real VMs; writes docs/conformance.md (as root)
	go test -tags=$(TAGS),integration -count=1 -timeout 45m -v ./integration/critest -update

.PHONY: bench-calls
bench-calls: ## lists and statuses with 1,000 pods, by themselves and while 20 VMs boot (fakes; as root)
	go test -run '^$$' -bench '^BenchmarkCalls$$' -benchtime 1000x ./server

.PHONY: bench-volumes
bench-volumes: guest ## files on root, emptyDir and hostPath beside a bare disk in the same guest; changes of a ConfigMap (as root; VOLBENCHFLAGS="-files 1000")
	go build -o $(BIN)/volbench ./integration/volbench
	$(BIN)/volbench -build $(BUILD) $(VOLBENCHFLAGS)
	go test -tags=$(TAGS),integration -count=1 -timeout 20m -v -run '^TestCopyLatency$$' ./integration

.PHONY: bench
bench: guest bench-volumes ## benchmarks beside containerd + runc; writes docs/performance.md (as root; BENCHFLAGS="-sections start,pull")
	go run ./integration/cmd/provision peer-packages containerd runc pause
	go build -o $(BIN)/bench ./integration/bench
	$(BIN)/bench -build $(BUILD) -docs docs/performance.md $(BENCHFLAGS)

.PHONY: lint
lint: ## go vet, staticcheck, gofmt, shellcheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "not gofmt-ed: $$unformatted"; exit 1; }
	go vet ./...
	go vet -tags=$(TAGS),integration ./...
	go tool staticcheck -tags=$(TAGS),integration ./...

.PHONY: protos
protos: ## regenerate agentproto from agent.proto (needs protobuf-compiler)
	go generate ./agentproto

.PHONY: check-protos
check-protos: protos ## fail when the generated code is not what agent.proto gives
	git diff --exit-code -- agentproto

.PHONY: install
install: all ## crivm, agent, guest image and systemd unit onto this machine (DESTDIR is honoured)
	install -D -m 755 $(BIN)/crivm $(DESTDIR)/usr/bin/crivm
	install -D -m 644 $(BUILD)/guest/vmlinux $(DESTDIR)/usr/lib/crivm/vmlinux
	install -D -m 644 $(BUILD)/guest/initramfs $(DESTDIR)/usr/lib/crivm/initramfs
	install -D -m 644 $(BUILD)/guest/guest.json $(DESTDIR)/usr/lib/crivm/guest.json
	install -D -m 644 contrib/crivm.service $(DESTDIR)/usr/lib/systemd/system/crivm.service

.PHONY: clean
clean: ## everything that was built
	rm -rf $(BUILD)
