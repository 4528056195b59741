# Every target does all the set-up it needs; a second run is quick.
CARGO ?= cargo
# Tests run with the optimiser and with debug assertions in our own crates. What
# they depend on is compiled as for a release build, so libtorch's binding is
# compiled once for both (see [profile.release.package."*"] in Cargo.toml).
CHECKED = CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true

.PHONY: help setup build demo test parity bench fmt lint doc clean

help:
	@echo 'make demo   set up everything and hear a real language model answer'
	@echo 'make test   set up everything and run every test'
	@echo 'make build  target/release/sequor and target/release/parity'
	@echo 'make parity the reference cases; SEQUOR_KERNELS=off|portable|avx2 before it chooses kernels'
	@echo 'make lint   formatting and clippy;  make doc   API documentation'
	@echo 'make bench  decoding speed of SmolLM2-135M on this machine'

setup:
	@scripts/setup

build: setup
	$(CARGO) build --release -p sequor-cli -p sequor-tests --bins

demo: build
	$(CARGO) run --release -q -p sequor-cli -- demo

test: build
	@$(CARGO) run --release -q -p sequor-cli -- models fetch smollm2 || echo 'make test: no network: tests on SmolLM2 will be skipped'
	$(CHECKED) $(CARGO) test --release --workspace

parity: setup
	$(CHECKED) $(CARGO) test --release -q -p sequor-tests --test main -- parity

bench: build
	$(CARGO) run --release -q -p sequor-cli -- bench decode

fmt:
	$(CARGO) fmt --all

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

doc: setup
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --workspace --no-deps

clean:
	$(CARGO) clean
	rm -rf out
