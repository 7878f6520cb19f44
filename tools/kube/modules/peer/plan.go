package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

type names struct{ claim, source, key, hash, job string }

func namesOf(owner *ModelDeployment) names {
	spec := owner.Spec
	key := digest([]any{spec.Model, spec.Parallelism, "vllm", 1})
	spec.Replicas = 0
	claim, source, _ := strings.Cut(strings.TrimPrefix(spec.Model.Source, "pvc://"), "/")
	if !strings.HasPrefix(spec.Model.Source, "pvc://") {
		claim, source = "", ""
	}
	return names{claim: spec.Volume.ExistingClaim.Name, source: claim + "/" + source, key: key,
		hash: digest([]any{spec, claim}), job: owner.Name + "-shard-" + key[:8]}
}

func digest(value any) string {
	text, _ := json.Marshal(value)
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8])
}

// validate returns what is wrong with a spec.
func validate(spec *Spec, n names) string {
	switch {
	case strings.HasPrefix(n.source, "/") || strings.HasSuffix(n.source, "/"):
		return fmt.Sprintf("spec.model.source: %q is not pvc://<claim>/<path>", spec.Model.Source)
	case n.claim == "":
		return "spec.volume.existingClaim.name: is missing"
	case spec.Engine.Image == "":
		return "spec.engine.image: is missing"
	case spec.Replicas < 0 || spec.Parallelism.Tensor < 1:
		return "spec.replicas, spec.parallelism.tensorParallelSize: too small"
	case spec.GPU.Sharing != "None" || spec.Loading.Path != "Off":
		return "spec.gpu.sharing, spec.loading.path: only None and Off are known here"
	}
	return ""
}

type planned struct {
	children []string // kinds to apply
	fill     *strings.Replacer
	status   Status
}

type draft struct {
	status          bool
	reason, message string
}

// plan decides what to do about a ModelDeployment, given its children.
func plan(owner *ModelDeployment, n names, seen *observed) planned {
	spec, live := &owner.Spec, &seen.deployment
	rolledOut := live.UID != "" && live.Status.ObservedGeneration == live.Generation &&
		live.Status.UpdatedReplicas >= spec.Replicas && live.Status.ReadyReplicas >= spec.Replicas &&
		live.Status.Replicas == live.Status.UpdatedReplicas
	result := planned{fill: strings.NewReplacer("@NAME@", owner.Name, "@NAMESPACE@", owner.Namespace,
		"@UID@", string(owner.UID), "@KEY@", n.key, "@KEY8@", n.key[:8], "@HASH@", n.hash,
		"@REPLICAS@", strconv.Itoa(int(spec.Replicas)))}

	volume := volumeReady(seen)
	checkpoint := checkpointReady(n, seen)
	resident := weightsResident(n, spec, checkpoint.status, seen)
	available := available(spec, resident.status, seen)
	if invalid := validate(spec, n); invalid != "" {
		volume = draft{false, "SpecInvalid", invalid}
	} else if volume.status && seen.job.UID == "" {
		result.children = []string{"Job"}
	} else if volume.status && (checkpoint.status || live.UID != "") {
		result.children = []string{"Deployment", "Service", "PodDisruptionBudget"}
	}
	ready := draft{true, "Serving", fmt.Sprintf("%d of %d replicas answer requests", spec.Replicas, spec.Replicas)}
	counts := fmt.Sprintf("%d of %d replicas are new, %d of %d answer requests",
		live.Status.UpdatedReplicas, spec.Replicas, live.Status.ReadyReplicas, spec.Replicas)
	if !rolledOut {
		ready = draft{false, "RollingOut", counts}
	}
	for _, part := range []draft{available, resident, checkpoint, volume} {
		if !part.status {
			ready = part
		}
	}
	reconciling, stalled := draft{true, ready.reason, ready.message}, draft{false, "Progressing", ready.message}
	if ready.status {
		reconciling = draft{false, "Settled", "everything is as specified"}
		stalled = reconciling
	}
	result.status = Status{
		ObservedGeneration: owner.Generation,
		Replicas:           live.Status.Replicas,
		ReadyReplicas:      live.Status.ReadyReplicas,
		UpdatedReplicas:    live.Status.UpdatedReplicas,
		Ready:              fmt.Sprintf("%d/%d", live.Status.ReadyReplicas, spec.Replicas),
		Path:               "POSIX",
		Selector:           "app.kubernetes.io/component=serve,headrace.dev/model-deployment=" + owner.Name,
		Checkpoint: CheckpointStatus{Key: n.key, Path: spec.Volume.Root + "/" + owner.Name + "/" + n.key,
			Job: n.job, Workers: completions(&seen.job), Progress: map[bool]string{true: "100%", false: "0%"}[checkpoint.status]},
		Volume:     VolumeStatus{ClaimName: n.claim, VolumeName: seen.claim.Spec.VolumeName},
		Conditions: append([]metav1.Condition(nil), owner.Status.Conditions...),
	}
	for _, c := range []struct {
		kind string
		draft
	}{
		{"VolumeReady", volume}, {"CheckpointReady", checkpoint}, {"WeightsResident", resident},
		{"Available", available}, {"Ready", ready},
		{"DirectPath", draft{false, "Off", "the direct path is off (spec.loading.path, spec.gpu.sharing)"}},
		{"Reconciling", reconciling}, {"Stalled", stalled},
	} {
		status := metav1.ConditionFalse
		if c.status {
			status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(&result.status.Conditions, metav1.Condition{Type: c.kind, Status: status,
			Reason: c.reason, Message: c.message, ObservedGeneration: owner.Generation})
	}
	return result
}

func volumeReady(seen *observed) draft {
	if seen.claim.Status.Phase != corev1.ClaimBound {
		return draft{false, "ClaimPending", "the claim is not bound"}
	}
	return draft{true, "Bound", fmt.Sprintf("claim %s is bound to %s", seen.claim.Name, seen.claim.Spec.VolumeName)}
}

func checkpointReady(n names, seen *observed) draft {
	for _, c := range seen.job.Status.Conditions {
		if c.Type == batchv1.JobComplete && c.Status == corev1.ConditionTrue {
			return draft{true, "Published", fmt.Sprintf("Job %s has published the checkpoint", n.job)}
		}
	}
	if seen.job.UID == "" {
		return draft{false, "ShardJobCreating", fmt.Sprintf("Job %s is being created", n.job)}
	}
	return draft{false, "ShardJobStarting", fmt.Sprintf("Job %s waits for its pods", n.job)}
}

func weightsResident(n names, spec *Spec, isPublished bool, seen *observed) draft {
	if seen.deployment.UID == "" && !isPublished {
		return draft{false, "WaitingForCheckpoint", "the checkpoint is not ready"}
	}
	resident := int32(0)
	for i := range seen.pods {
		pod := &seen.pods[i]
		if pod.DeletionTimestamp != nil || pod.Annotations["headrace.dev/checkpoint-key"] != n.key {
			continue
		}
		for _, status := range pod.Status.InitContainerStatuses {
			if status.Name == "loader" && status.Ready {
				resident++
			}
		}
	}
	counts := fmt.Sprintf("%d of %d replicas hold the weights", resident, spec.Replicas)
	if resident >= spec.Replicas && seen.deployment.UID != "" {
		return draft{true, "Resident", counts}
	}
	return draft{false, "PodsStarting", counts}
}

func available(spec *Spec, isResident bool, seen *observed) draft {
	ready := seen.deployment.Status.ReadyReplicas
	if ready > 0 {
		return draft{true, "Serving", fmt.Sprintf("%d of %d replicas answer requests", ready, spec.Replicas)}
	}
	if !isResident {
		return draft{false, "WaitingForWeights", "no replica holds the weights yet"}
	}
	return draft{false, "EngineStarting", "the engine is starting"}
}

func completions(job *batchv1.Job) int32 {
	if job.Spec.Completions == nil {
		return 0
	}
	return *job.Spec.Completions
}

// transitions returns the conditions whose change is an event: three repeat others.
func transitions(before, after []metav1.Condition) []metav1.Condition {
	var news []metav1.Condition
	for _, c := range after {
		isSummary := c.Type == "Ready" || c.Type == "Stalled"
		old := meta.FindStatusCondition(before, c.Type)
		switch {
		case c.Type == "Reconciling":
		case old == nil && (c.Status != metav1.ConditionTrue || c.Type == "Ready"):
		case old != nil && old.Status == c.Status && (old.Reason == c.Reason || isSummary):
		default:
			news = append(news, c)
		}
	}
	return news
}
