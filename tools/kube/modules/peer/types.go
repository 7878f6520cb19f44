package main

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var groupVersion = schema.GroupVersion{Group: "headrace.dev", Version: "v1alpha1"}

// Spec is what the peer reads of a ModelDeployment's spec.
type Spec struct {
	Replicas int32 `json:"replicas"`
	Model    struct {
		Source       string `json:"source"`
		Revision     string `json:"revision"`
		Dtype        string `json:"dtype"`
		Quantization string `json:"quantization"`
	} `json:"model"`
	Parallelism struct {
		Tensor   int32 `json:"tensorParallelSize"`
		Pipeline int32 `json:"pipelineParallelSize"`
		Expert   int32 `json:"expertParallelSize"`
	} `json:"parallelism"`
	Volume struct {
		ExistingClaim struct {
			Name string `json:"name"`
		} `json:"existingClaim"`
		Root string `json:"root"`
	} `json:"volume"`
	GPU struct {
		Sharing string `json:"sharing"`
	} `json:"gpu"`
	Loading struct {
		Path string `json:"path"`
	} `json:"loading"`
	Engine struct {
		Image string `json:"image"`
	} `json:"engine"`
}

// CheckpointStatus is a part of Status.
type CheckpointStatus struct {
	Key      string `json:"key"`
	Path     string `json:"path"`
	Job      string `json:"job"`
	Workers  int32  `json:"workers,omitempty"`
	Progress string `json:"progress"`
}

// VolumeStatus is a part of Status.
type VolumeStatus struct {
	ClaimName  string `json:"claimName"`
	VolumeName string `json:"volumeName,omitempty"`
}

// Status is what the operator writes: the same fields as the operator it is compared with.
type Status struct {
	ObservedGeneration int64              `json:"observedGeneration"`
	Replicas           int32              `json:"replicas"`
	ReadyReplicas      int32              `json:"readyReplicas"`
	UpdatedReplicas    int32              `json:"updatedReplicas"`
	Ready              string             `json:"ready"`
	Path               string             `json:"path,omitempty"`
	Selector           string             `json:"selector"`
	Checkpoint         CheckpointStatus   `json:"checkpoint"`
	Volume             VolumeStatus       `json:"volume"`
	Conditions         []metav1.Condition `json:"conditions"`
}

// ModelDeployment is the custom resource.
type ModelDeployment struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              Spec   `json:"spec"`
	Status            Status `json:"status,omitzero"`
}

// DeepCopyObject copies: conditions are the only reference in it besides the metadata.
func (m *ModelDeployment) DeepCopyObject() runtime.Object {
	copied := *m
	m.ObjectMeta.DeepCopyInto(&copied.ObjectMeta)
	copied.Status.Conditions = slices.Clone(m.Status.Conditions)
	return &copied
}

// ModelDeploymentList is a list of them.
type ModelDeploymentList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []ModelDeployment `json:"items"`
}

// DeepCopyObject copies the list and its items.
func (l *ModelDeploymentList) DeepCopyObject() runtime.Object {
	copied := *l
	l.ListMeta.DeepCopyInto(&copied.ListMeta)
	copied.Items = make([]ModelDeployment, len(l.Items))
	for i := range l.Items {
		copied.Items[i] = *l.Items[i].DeepCopyObject().(*ModelDeployment)
	}
	return &copied
}

func register(scheme *runtime.Scheme) {
	scheme.AddKnownTypes(groupVersion, &ModelDeployment{}, &ModelDeploymentList{})
	metav1.AddToGroupVersion(scheme, groupVersion)
}
