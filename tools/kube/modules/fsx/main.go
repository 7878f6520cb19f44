// fake-fsx-driver stands in for the CSI driver fsx.csi.aws.com: it speaks CSI over
// gRPC as the driver's controller does, and makes no file system. It rounds sizes,
// refuses and waits as aws-fsx-csi-driver v1.9.0 does; the subnet of the
// StorageClass says what happens:
//
//	subnet-slow...  calls run into the driver's time limit until the file SOCKET.done is there
//	subnet-full...  FSx has no room, for ever
//	others          the file system is there at once
//
// Each call is written to standard output as one line: the call, the volume's name
// and the file system's ID. A volume has one file system, however often it is asked for.
package main

import (
	"context"
	"fmt"
	"hash/fnv"
	"log"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	gib         = int64(1) << 30
	defaultSize = 1200 * gib
	step        = 2400 * gib
)

type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	mutex sync.Mutex
	made  map[string]string
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: "fsx.csi.aws.com", VendorVersion: "fake"}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	service := &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}
	capability := &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: service}}
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{capability}}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	rpc := &csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME}
	capability := &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: rpc}}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{capability}}, nil
}

func (d *driver) CreateVolume(_ context.Context, request *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	name, parameters := request.GetName(), request.GetParameters()
	subnet := parameters["subnetId"]
	if strings.HasPrefix(subnet, "subnet-full") {
		fmt.Println("CreateVolume", name, "refused")
		return nil, status.Errorf(codes.Internal,
			"Could not create volume %q: CreateFileSystem failed: InsufficientSubnetCapacity: no free addresses in %s", name, subnet)
	}
	id, known := d.made[name]
	if !known {
		hash := fnv.New64a()
		hash.Write([]byte(name))
		id = fmt.Sprintf("fs-%017x", hash.Sum64())
		d.made[name] = id
	}
	fmt.Println("CreateVolume", name, id)
	if _, err := os.Stat(os.Args[1] + ".done"); err != nil && strings.HasPrefix(subnet, "subnet-slow") {
		return nil, status.Error(codes.Internal, "Filesystem is not ready: timed out waiting for the condition")
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId:      id,
		CapacityBytes: rounded(request.GetCapacityRange().GetRequiredBytes()),
		VolumeContext: map[string]string{"dnsname": id + ".fsx.test-1.amazonaws.com", "mountname": "abcdef01"},
	}}, nil
}

func (d *driver) DeleteVolume(_ context.Context, request *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	fmt.Println("DeleteVolume", "-", request.GetVolumeId())
	return &csi.DeleteVolumeResponse{}, nil
}

// rounded is the rule of the driver's pkg/util for SSD.
func rounded(bytes int64) int64 {
	if bytes <= defaultSize {
		return defaultSize
	}
	return (bytes + step - 1) / step * step
}

func main() {
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	server, fake := grpc.NewServer(), &driver{made: map[string]string{}}
	csi.RegisterIdentityServer(server, fake)
	csi.RegisterControllerServer(server, fake)
	log.Fatal(server.Serve(listener))
}
