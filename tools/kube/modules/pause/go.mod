// Pins the sandbox process of pods and of the test node. No dependencies.
module headrace.dev/tools/kube/pause

go 1.26.0
