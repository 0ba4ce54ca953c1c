package main

import (
	"strings"
	"testing"

	"github.com/crivm/crivm/imageservice"
)

func TestWriteImages(t *testing.T) {
	var out strings.Builder
	err := writeImages(&out, imageservice.Overview{
		Images: []imageservice.ImageUse{
			{ID: "sha256:" + strings.Repeat("a", 64), Names: []string{"docker.io/library/busybox:1", "docker.io/library/busybox@sha256:1"}, Pinned: true, LayerBytes: 2 << 20, OwnBytes: 1 << 20, DiskBytes: 5 << 19, Containers: 3},
			{ID: "sha256:" + strings.Repeat("b", 64)},
		},
		Pulls: []imageservice.PullUnder{
			{Image: "registry/app:1", Phase: "layers", Seconds: 12.4, Layers: 2, LayerCount: 7, Bytes: 3 << 20, TotalBytes: 9 << 20},
			{Image: "registry/other:1", Phase: "manifest", Seconds: 0.1},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{
		"IMAGE ID LAYERS OWN DISK CONTAINERS",
		"docker.io/library/busybox:1 (pinned) sha256:aaaaaaaaaaaa 2.0 MiB 1.0 MiB 2.5 MiB 3",
		"<none> sha256:bbbbbbbbbbbb 0.0 MiB 0.0 MiB none 0",
		"",
		"PULLING FOR PHASE LAYERS BYTES",
		"registry/app:1 12s layers 2 of 7 3.0 MiB of 9.0 MiB",
		"registry/other:1 0s manifest",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("written:\n%s", out.String())
	}
}
