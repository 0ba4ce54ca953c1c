package imageservice

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// BenchmarkPullLayers measures PullImage of an image of 200 small layers.
func BenchmarkPullLayers(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("unpacking layers with their owners needs root")
	}
	var layers []v1.Layer
	for i := range 200 {
		layers = append(layers, tarLayer(b, map[string]string{fmt.Sprintf("dir%d/file", i): strings.Repeat(fmt.Sprint(i), 5000)}))
	}
	reg := newRegistry(b, false)
	s := newService(b, func(c *Config) { write(b, c.RegistriesConf, insecure(reg)) })
	ref := reg.push(b, "bench:1", newImage(b, nil, layers...))
	for b.Loop() {
		pull(b, s, ref)
		b.StopTimer()
		remove(b, s, ref)
		b.StartTimer()
	}
}

// BenchmarkPullLarge measures PullImage of an image of three layers of 50 MB that compress to half, as programs do.
func BenchmarkPullLarge(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("unpacking layers with their owners needs root")
	}
	random := rand.New(rand.NewPCG(1, 2))
	var layers []v1.Layer
	for i := range 3 {
		files := map[string]string{}
		for f := range 50 {
			content := make([]byte, 1<<20)
			for k := 0; k < len(content); k += 8 {
				if k > 4096 && random.IntN(2) == 0 {
					copy(content[k:k+8], content[k-1-random.IntN(4000):])
					continue
				}
				binary.LittleEndian.PutUint64(content[k:], random.Uint64())
			}
			files[fmt.Sprintf("dir%d/file%d", i, f)] = string(content)
		}
		layers = append(layers, tarLayer(b, files))
	}
	reg := newRegistry(b, false)
	s := newService(b, func(c *Config) { write(b, c.RegistriesConf, insecure(reg)) })
	ref := reg.push(b, "bench:1", newImage(b, nil, layers...))
	b.SetBytes(150 << 20)
	for b.Loop() {
		pull(b, s, ref)
		b.StopTimer()
		remove(b, s, ref)
		b.StartTimer()
	}
}
