// Sources of others' custom resource definitions; nothing of it is built.
module headrace.dev/tools/kube/crds

go 1.25.0

require github.com/kedacore/keda/v2 v2.21.0
