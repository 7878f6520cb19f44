// fake-gpu-driver stands in for a DRA driver of GPUs: it publishes devices that do
// not exist and prepares claims to them, with the library that real drivers are
// made of and over the sockets of a real kubelet. A container that is given a claim
// sees, for each of its GPUs, the device /dev/fake-gpu-N (/dev/null by another name) and
// the variable FAKE_GPU_N with the GPU's UUID. Each -mount SOURCE:TARGET is a file of
// the node that it sees as well, as real drivers mount theirs.
//
// Each claim is written to standard output as one line: what was done to it, its name
// and, while it is prepared, its GPUs. Which claims are prepared is the set of CDI
// specifications on the node, nothing else.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	resource "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"
)

const (
	driverName = "gpu.example.com"
	cdiKind    = driverName + "/gpu"
	cdiVersion = "0.6.0"
	cdiFolder  = "/var/run/cdi"
)

// spec and what it is made of are the parts used here of a CDI specification.
// Source: https://github.com/cncf-tags/container-device-interface, SPEC.md.
type spec struct {
	Version string   `json:"cdiVersion"`
	Kind    string   `json:"kind"`
	Devices []device `json:"devices"`
}

type device struct {
	Name  string `json:"name"`
	Edits edits  `json:"containerEdits"`
}

type edits struct {
	Env         []string `json:"env"`
	DeviceNodes []node   `json:"deviceNodes"`
	Mounts      []mount  `json:"mounts,omitempty"`
}

type node struct {
	Path     string `json:"path"`
	HostPath string `json:"hostPath"`
}

type mount struct {
	HostPath      string   `json:"hostPath"`
	ContainerPath string   `json:"containerPath"`
	Options       []string `json:"options"`
}

// mounts is the flag -mount, which may be repeated.
type mounts []mount

func (m *mounts) String() string { return fmt.Sprint(*m) }

func (m *mounts) Set(value string) error {
	source, target, found := strings.Cut(value, ":")
	if !found {
		return fmt.Errorf("%q is not SOURCE:TARGET", value)
	}
	*m = append(*m, mount{source, target, []string{"ro", "bind"}})
	return nil
}

type driver struct {
	mounts mounts
	cancel context.CancelFunc
}

func (d *driver) PrepareResourceClaims(_ context.Context, claims []*resource.ResourceClaim) (map[types.UID]kubeletplugin.PrepareResult, error) {
	results := map[types.UID]kubeletplugin.PrepareResult{}
	for _, claim := range claims {
		results[claim.UID] = d.prepare(claim)
	}
	return results, nil
}

func (d *driver) prepare(claim *resource.ResourceClaim) kubeletplugin.PrepareResult {
	found := spec{Version: cdiVersion, Kind: cdiKind}
	prepared, names := []kubeletplugin.Device{}, []string{}
	for _, result := range claim.Status.Allocation.Devices.Results {
		if result.Driver != driverName {
			continue
		}
		// Runtimes keep what they read: a name must never come to mean something else.
		name := fmt.Sprintf("%s-%s", claim.UID, result.Device)
		found.Devices = append(found.Devices, device{name, d.edits(result.Device)})
		prepared = append(prepared, kubeletplugin.Device{
			Requests:     []string{result.Request},
			PoolName:     result.Pool,
			DeviceName:   result.Device,
			CDIDeviceIDs: []string{cdiKind + "=" + name},
		})
		names = append(names, result.Device)
	}
	if err := write(specPath(claim.UID), found); err != nil {
		return kubeletplugin.PrepareResult{Err: err}
	}
	fmt.Println("prepared", claim.Name, strings.Join(names, " "))
	return kubeletplugin.PrepareResult{Devices: prepared}
}

func (d *driver) edits(gpu string) edits {
	number := strings.TrimPrefix(gpu, "gpu-")
	return edits{
		Env:         []string{fmt.Sprintf("FAKE_GPU_%s=%s", number, uuid(number))},
		DeviceNodes: []node{{"/dev/fake-" + gpu, "/dev/null"}},
		Mounts:      d.mounts,
	}
}

func (d *driver) UnprepareResourceClaims(_ context.Context, claims []kubeletplugin.NamespacedObject) (map[types.UID]error, error) {
	results := map[types.UID]error{}
	for _, claim := range claims {
		err := os.Remove(specPath(claim.UID))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		results[claim.UID] = err
		fmt.Println("unprepared", claim.Name)
	}
	return results, nil
}

func (d *driver) HandleError(_ context.Context, err error, message string) {
	log.Printf("%s: %v", message, err)
	if !errors.Is(err, kubeletplugin.ErrRecoverable) {
		d.cancel()
	}
}

func uuid(number string) string { return fmt.Sprintf("GPU-00000000-0000-4000-8000-%012s", number) }

func specPath(claim types.UID) string {
	return filepath.Join(cdiFolder, fmt.Sprintf("%s-%s.json", driverName, claim))
}

// write puts a specification in place in one step: runtimes watch the folder.
func write(path string, content spec) error {
	encoded, err := json.Marshal(content)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", encoded, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

func pool(count int) resourceslice.Pool {
	devices := make([]resource.Device, count)
	for index := range devices {
		value := uuid(fmt.Sprint(index))
		devices[index] = resource.Device{
			Name:       fmt.Sprintf("gpu-%d", index),
			Attributes: map[resource.QualifiedName]resource.DeviceAttribute{"uuid": {StringValue: &value}},
		}
	}
	return resourceslice.Pool{Slices: []resourceslice.Slice{{Devices: devices}}}
}

func run(ctx context.Context, fake *driver, kubeconfig, nodeName string, gpus int) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	for _, folder := range []string{cdiFolder, filepath.Join(kubeletplugin.KubeletPluginsDir, driverName)} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	helper, err := kubeletplugin.Start(ctx, fake,
		kubeletplugin.DriverName(driverName),
		kubeletplugin.NodeName(nodeName),
		kubeletplugin.KubeClient(client),
	)
	if err != nil {
		return err
	}
	defer helper.Stop()
	pools := map[string]resourceslice.Pool{nodeName: pool(gpus)}
	if err := helper.PublishResources(ctx, resourceslice.DriverResources{Pools: pools}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

func main() {
	fake := &driver{}
	kubeconfig := flag.String("kubeconfig", "", "path of a kubeconfig")
	nodeName := flag.String("node", "", "name of the node")
	gpus := flag.Int("gpus", 8, "number of GPUs")
	flag.Var(&fake.mounts, "mount", "SOURCE:TARGET, a file for every container with a GPU")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	fake.cancel = cancel
	if err := run(ctx, fake, *kubeconfig, *nodeName, *gpus); err != nil {
		log.Fatal(err)
	}
}
