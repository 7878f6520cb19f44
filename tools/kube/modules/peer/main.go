// peer is an operator on controller-runtime that does the same shape of work as Headrace's, to be
// measured beside it: the same informers with the same selectors, the same children with the same
// bodies (PEER_BODIES, made from Headrace's own plan), the same conditions and events at the same
// steps. It has no rollouts, failures, volumes or deletion policies of its own.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

const (
	ownerLabel = "headrace.dev/model-deployment"
	manager    = "headrace-peer"
	workers    = 4 // as many as Headrace has
)

func main() {
	log.SetLogger(zap.New())
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	text, err := os.ReadFile(os.Getenv("PEER_BODIES"))
	if err != nil {
		return fmt.Errorf("PEER_BODIES: %w", err)
	}
	var bodies map[string]string
	if err := json.Unmarshal(text, &bodies); err != nil {
		return fmt.Errorf("PEER_BODIES: %w", err)
	}
	mgr, err := newManager()
	if err != nil {
		return err
	}
	r := &reconciler{Client: mgr.GetClient(), reader: mgr.GetAPIReader(), bodies: bodies,
		events: mgr.GetEventRecorderFor(manager)}
	if err := r.setUp(mgr); err != nil {
		return err
	}
	return mgr.Start(ctrl.SetupSignalHandler())
}

func newManager() (ctrl.Manager, error) {
	config, err := ctrl.GetConfig()
	if err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return nil, err
	}
	register(scheme)
	isChild, err := labels.NewRequirement(ownerLabel, selection.Exists, nil)
	if err != nil {
		return nil, err
	}
	children := cache.ByObject{Label: labels.NewSelector().Add(*isChild)}
	return ctrl.NewManager(config, ctrl.Options{
		Scheme: scheme,
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&batchv1.Job{}: children, &appsv1.Deployment{}: children, &corev1.Service{}: children,
				&policyv1.PodDisruptionBudget{}: children, &corev1.Pod{}: children,
				&resourcev1.ResourceClaimTemplate{}: children,
			},
		},
		Metrics: server.Options{BindAddress: "127.0.0.1:" + os.Getenv("PEER_METRICS_PORT")},
	})
}
