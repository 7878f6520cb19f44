# Every target is a command of tools/workspace, which needs Python >= 3.11 and nothing else.
PYTHON ?= python3
ARGS ?=
WORKSPACE := PYTHONPATH=tools $(PYTHON) -m workspace

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.PHONY: demo test test-faults test-sglang lint
demo: ## one manifest in, one answer out, on a real cluster that is torn down afterwards
	@$(WORKSPACE) demo $(ARGS)
test: ## set everything up and run the whole suite; ARGS go to pytest
	@$(WORKSPACE) test $(ARGS)
test-faults: ## the fault suite with a kill at every single API call, before and after it acts
	@$(WORKSPACE) test-faults $(ARGS)
test-sglang: ## SGLang's whole engine over resident weights; make test compares its tensors
	@$(WORKSPACE) test-sglang $(ARGS)
lint: ## formatting, lint, types, dependency directions, generated files, chart
	@$(WORKSPACE) lint

.PHONY: bench-loader
bench-loader: ## measure the loader against the hardware's limits and its peers; see --help
	@$(WORKSPACE) bench-loader $(ARGS)

.PHONY: bench-operator
bench-operator: ## thousands of ModelDeployments on simulated nodes; ARGS="--deployments 5000"
	@$(WORKSPACE) bench-operator $(ARGS)

.PHONY: monitoring check-alerts pictures
monitoring: ## scrape a model on a real cluster with a real Prometheus and ask it every query
	@$(WORKSPACE) monitoring $(ARGS)
pictures: ## record a real cold start as docs/status.svg and docs/timeline.svg
	@$(WORKSPACE) pictures $(ARGS)
check-alerts: ## build promtool (minutes, once) and test the alerts with it
	@$(WORKSPACE) check-alerts $(ARGS)

.PHONY: venv images crds docs dashboards lock
venv: ## make .venv from the lock file
	@$(WORKSPACE) venv
images: ## build the container images into the cache
	@$(WORKSPACE) images $(ARGS)
crds: ## generate the CRD from the pydantic models
	@$(WORKSPACE) crds
docs: ## the documentation as a site, into .cache/site
	@$(WORKSPACE) docs $(ARGS)
dashboards: ## generate the chart's Grafana dashboards
	@$(WORKSPACE) dashboards
lock: ## compile requirements/*.txt again; ARGS="--upgrade" takes newer versions
	@$(WORKSPACE) lock $(ARGS)

.PHONY: bench-sharder
bench-sharder: ## `headrace shard` against cp on this disk; ARGS="--gib 8 --directory DIR"
	@$(WORKSPACE) bench-sharder $(ARGS)

.PHONY: cluster-up cluster-down
cluster-up: ## bring a cluster with a real node up and print its environment
	@$(WORKSPACE) cluster-up
cluster-down: ## tear it down
	@$(WORKSPACE) cluster-down
