package main

import (
	"context"
	"encoding/json"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

const (
	byOwner = "owner"
	byClaim = "claim"

	appliedAnnotation = "headrace.dev/applied"
)

type reconciler struct {
	client.Client
	reader client.Reader
	bodies map[string]string
	events record.EventRecorder
}

func (r *reconciler) setUp(mgr ctrl.Manager) error {
	ctx := context.Background()
	owner := func(o client.Object) []string { return []string{o.GetLabels()[ownerLabel]} }
	if err := mgr.GetFieldIndexer().IndexField(ctx, &corev1.Pod{}, byOwner, owner); err != nil {
		return err
	}
	claim := func(o client.Object) []string {
		return []string{o.(*ModelDeployment).Spec.Volume.ExistingClaim.Name}
	}
	if err := mgr.GetFieldIndexer().IndexField(ctx, &ModelDeployment{}, byClaim, claim); err != nil {
		return err
	}
	return ctrl.NewControllerManagedBy(mgr).
		For(&ModelDeployment{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Owns(&batchv1.Job{}).Owns(&appsv1.Deployment{}).Owns(&corev1.Service{}).
		Owns(&policyv1.PodDisruptionBudget{}).Owns(&resourcev1.ResourceClaimTemplate{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(ofPod)).
		Watches(&corev1.PersistentVolumeClaim{}, handler.EnqueueRequestsFromMapFunc(r.ofClaim)).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		Complete(r)
}

func ofPod(_ context.Context, o client.Object) []reconcile.Request {
	key := types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetLabels()[ownerLabel]}
	return []reconcile.Request{{NamespacedName: key}}
}

func (r *reconciler) ofClaim(ctx context.Context, o client.Object) []reconcile.Request {
	var users ModelDeploymentList
	where := []client.ListOption{client.InNamespace(o.GetNamespace()),
		client.MatchingFields{byClaim: o.GetName()}, client.UnsafeDisableDeepCopy}
	if err := r.List(ctx, &users, where...); err != nil {
		return nil
	}
	requests := make([]reconcile.Request, len(users.Items))
	for i := range users.Items {
		requests[i].NamespacedName = client.ObjectKeyFromObject(&users.Items[i])
	}
	return requests
}

// Reconcile observes, plans, applies what differs, reports transitions and writes the status.
func (r *reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var owner ModelDeployment
	if err := r.Get(ctx, request.NamespacedName, &owner); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if owner.DeletionTimestamp != nil {
		return ctrl.Result{}, nil
	}
	names := namesOf(&owner)
	seen, err := r.observe(ctx, &owner, names)
	if err != nil {
		return ctrl.Result{}, err
	}
	planned := plan(&owner, names, seen)
	for _, kind := range planned.children {
		if err := r.apply(ctx, &owner, kind, planned.fill.Replace(r.bodies[kind]), seen.of(kind)); err != nil {
			return ctrl.Result{}, err
		}
	}
	for _, news := range transitions(owner.Status.Conditions, planned.status.Conditions) {
		r.events.Event(&owner, corev1.EventTypeNormal, news.Reason, news.Type+": "+news.Message)
	}
	return ctrl.Result{}, r.writeStatus(ctx, &owner, planned.status)
}

// observed has the children and the claim; one that is not there has no UID.
type observed struct {
	claim      corev1.PersistentVolumeClaim
	job        batchv1.Job
	deployment appsv1.Deployment
	service    corev1.Service
	budget     policyv1.PodDisruptionBudget
	pods       []corev1.Pod
}

func (o *observed) of(kind string) client.Object {
	return map[string]client.Object{"Job": &o.job, "Deployment": &o.deployment,
		"Service": &o.service, "PodDisruptionBudget": &o.budget}[kind]
}

func (r *reconciler) observe(ctx context.Context, owner *ModelDeployment, n names) (*observed, error) {
	var seen observed
	wanted := map[string]client.Object{n.claim: &seen.claim, n.job: &seen.job}
	get := func(name string, into client.Object) error {
		key := types.NamespacedName{Namespace: owner.Namespace, Name: name}
		return client.IgnoreNotFound(r.Get(ctx, key, into))
	}
	for name, into := range wanted {
		if err := get(name, into); err != nil {
			return nil, err
		}
	}
	for _, into := range []client.Object{&seen.deployment, &seen.service, &seen.budget} {
		if err := get(owner.Name, into); err != nil {
			return nil, err
		}
	}
	var pods corev1.PodList
	err := r.List(ctx, &pods, client.InNamespace(owner.Namespace),
		client.MatchingFields{byOwner: owner.Name}, client.UnsafeDisableDeepCopy)
	seen.pods = pods.Items
	return &seen, err
}

// apply applies a child unless that was done with the same body, by an annotation: what others
// change is not repaired. A child of somebody else is not taken over.
func (r *reconciler) apply(
	ctx context.Context, owner *ModelDeployment, kind, body string, live client.Object,
) error {
	applied := digest(body)
	if live.GetUID() != "" && (kind == "Job" || live.GetAnnotations()[appliedAnnotation] == applied) {
		return nil
	}
	child := &unstructured.Unstructured{}
	if err := json.Unmarshal([]byte(body), &child.Object); err != nil {
		return fmt.Errorf("%s of %s: %w", kind, owner.Name, err)
	}
	if live.GetUID() == "" {
		// Without the label it is in no cache, but may have the name.
		err := r.reader.Get(ctx, client.ObjectKeyFromObject(child), live)
		if client.IgnoreNotFound(err) != nil {
			return err
		}
	}
	if live.GetUID() != "" && !metav1.IsControlledBy(live, owner) {
		return fmt.Errorf("%s %s exists and is not ours", kind, live.GetName())
	}
	annotations := child.GetAnnotations()
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[appliedAnnotation] = applied
	child.SetAnnotations(annotations)
	return r.Apply(ctx, client.ApplyConfigurationFromUnstructured(child),
		client.FieldOwner(manager), client.ForceOwnership)
}

func (r *reconciler) writeStatus(ctx context.Context, owner *ModelDeployment, status Status) error {
	if equality.Semantic.DeepEqual(owner.Status, status) {
		return nil
	}
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&status)
	if err != nil {
		return err
	}
	object := &unstructured.Unstructured{Object: map[string]any{"status": fields}}
	object.SetGroupVersionKind(groupVersion.WithKind("ModelDeployment"))
	object.SetNamespace(owner.Namespace)
	object.SetName(owner.Name)
	object.SetUID(owner.UID)
	return client.IgnoreNotFound(r.Status().Apply(ctx,
		client.ApplyConfigurationFromUnstructured(object),
		client.FieldOwner(manager), client.ForceOwnership))
}
