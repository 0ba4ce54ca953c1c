package imageservice

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestOverview: what images take, together and alone, and how far a pull is, in the list and in the metrics.
func TestOverview(t *testing.T) {
	reg := newRegistry(t, false)
	registry := prometheus.NewRegistry()
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.Metrics = registry
	})
	base, waited := tarLayer(t, map[string]string{"base": strings.Repeat("b", 50000)}), tarLayer(t, map[string]string{"waited": "w"})
	one := pull(t, s, reg.push(t, "one:1", newImage(t, nil, base, tarLayer(t, map[string]string{"one": "1"}))))
	two := reg.push(t, "two:1", newImage(t, nil, base, waited))
	hash, err := waited.Digest()
	if err != nil {
		t.Fatal(err)
	}
	c := countRequests(t, reg, hash.String())
	ended := make(chan error, 1)
	go func() {
		_, err := tryPull(context.Background(), s, two, nil)
		ended <- err
	}()
	var o Overview
	waitUntil(t, "the layer is asked for, and the other known to be there", func() bool {
		o, err = s.Overview(context.Background())
		return err != nil || c.of(hash.String()) == 1 && len(o.Pulls) == 1 && o.Pulls[0].Layers == 1
	})
	if err != nil || len(o.Images) != 1 || len(o.Pulls) != 1 {
		t.Fatalf("%+v, %v", o, err)
	}
	if img := o.Images[0]; img.ID != one || img.Layers != 2 || img.OwnBytes != img.LayerBytes || img.DiskBytes < 50000 || !strings.Contains(img.Names[0], "one:1") {
		t.Errorf("image is %+v", img)
	}
	size, err := base.Size()
	if err != nil {
		t.Fatal(err)
	}
	rest, err := waited.Size()
	if err != nil {
		t.Fatal(err)
	}
	if p := o.Pulls[0]; p.Image != two || p.Phase != "layers" || p.Layers != 1 || p.LayerCount != 2 || p.Bytes != size || p.TotalBytes != size+rest {
		t.Errorf("pull is %+v; the layer that is there has %d bytes, the other %d", p, size, rest)
	}
	if got := metrics(t, registry); got["crivm_image_pulls"] != 1 || got["crivm_image_pull_remaining_bytes"] != float64(rest) {
		t.Errorf("metrics are %v", got)
	}
	close(c.release)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if o, err = s.Overview(context.Background()); err != nil || len(o.Images) != 2 || len(o.Pulls) != 0 {
		t.Fatalf("%+v, %v", o, err)
	}
	if img := o.Images[1]; img.OwnBytes != rest || img.LayerBytes != size+rest {
		t.Errorf("image is %+v, want %d bytes of its own", img, rest)
	}
	reg.intercept(func(w http.ResponseWriter, r *http.Request, _ http.Handler) { http.Error(w, "no", http.StatusNotFound) })
	if _, err := tryPull(context.Background(), s, reg.host+"/three:1", nil); err == nil {
		t.Error("pulled an image that is not there")
	}
	if got := metrics(t, registry); got["crivm_image_pulls"] != 0 || got["crivm_image_pull_remaining_bytes"] != 0 || got["crivm_image_pulls_total ok"] != 2 ||
		got["crivm_image_pulls_total failed"] != 1 || got["crivm_image_pull_seconds"] != 2 || got["crivm_image_pull_bytes_total"] < float64(size+rest) {
		t.Errorf("metrics are %v", got)
	}
}

// metrics are the values of gauges and counters, and the counts of histograms, with the values of their labels.
func metrics(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			values[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return values
}

// TestWatchLayers: a pull is stalled when the layers that are being received do not grow, and not while all of them wait
// behind those of other pulls.
func TestWatchLayers(t *testing.T) {
	const timeout = time.Minute
	for _, tt := range []struct {
		name    string
		begin   func(*pullState)
		stalled bool
	}{
		{"manifest", func(*pullState) {}, true},
		{"receiving", func(p *pullState) { p.blobs[0].counter.Load().receiving.Store(true) }, true},
		{"queued", func(*pullState) {}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &pullState{ref: "image", started: time.Now()}
				if tt.name != "manifest" {
					p.expect([]layer{{id: "a", bytes: 1000}, {id: "b", bytes: 10}})
					p.blobs[0].follow(&blobCounter{})
					p.blobs[1].ready()
				}
				tt.begin(p)
				ctx, cancel := context.WithCancelCause(context.Background())
				defer cancel(nil)
				stop := p.watch(cancel, timeout)
				if tt.name == "receiving" { // slowly
					for range 5 {
						time.Sleep(50 * time.Second)
						p.blobs[0].counter.Load().got.Add(1)
					}
					if ctx.Err() != nil {
						t.Fatal("cancelled while there was progress")
					}
				}
				time.Sleep(2 * timeout)
				synctest.Wait()
				if stalled := context.Cause(ctx) == errStalled; stalled != tt.stalled {
					t.Errorf("stalled: %t, want %t", stalled, tt.stalled)
				}
				stop()
				stop()
			})
		})
	}
}

// TestReport: the log hears of a pull now and then, not of each byte.
func TestReport(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	defer slog.SetDefault(before)
	synctest.Test(t, func(t *testing.T) {
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		p := &pullState{ref: "registry/image:1", started: time.Now()}
		p.expect([]layer{{id: "a", bytes: 1000}, {id: "b", bytes: 10}})
		stop := p.report()
		var counter blobCounter
		p.blobs[0].follow(&counter)
		p.blobs[1].ready()
		for range 350 {
			counter.got.Add(1)
			time.Sleep(100 * time.Millisecond)
		}
		stop()
	})
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 3 || !strings.Contains(lines[2], "image=registry/image:1 phase=layers bytes=3") || !strings.Contains(lines[2], "of_bytes=1010 layers=1 of_layers=2 for=30s") {
		t.Errorf("in 35 s the log got %q", lines)
	}
}

// sentImages keeps the messages of a streamed list apart.
type sentImages struct {
	grpc.ServerStreamingServer[cri.StreamImagesResponse]
	sizes []int
	ids   []string
	err   error
}

func (s *sentImages) Send(r *cri.StreamImagesResponse) error {
	s.sizes = append(s.sizes, len(r.GetImages()))
	for _, img := range r.GetImages() {
		s.ids = append(s.ids, img.GetId())
	}
	return s.err
}

// TestStreamImagesBounds: messages are bounded by bytes, like those of the other lists.
func TestStreamImagesBounds(t *testing.T) {
	var images []*cri.Image
	var want []string
	for i, size := range []int{400 << 10, 400 << 10, 400 << 10, 3 << 20, 10} {
		id := string(rune('a' + i))
		images = append(images, &cri.Image{Id: id, RepoTags: []string{strings.Repeat("x", size)}})
		want = append(want, id)
	}
	for range 1000 { // small ones go together
		images = append(images, &cri.Image{Id: "small"})
		want = append(want, "small")
	}
	stream := &sentImages{}
	if err := sendImages(images, stream); err != nil || !slices.Equal(stream.ids, want) || !slices.Equal(stream.sizes, []int{2, 1, 1, 1001}) {
		t.Errorf("messages of %v images, %d of %d in order (%v)", stream.sizes, len(stream.ids), len(want), err)
	}
	if err := sendImages(images, &sentImages{err: io.ErrClosedPipe}); err != io.ErrClosedPipe {
		t.Errorf("error %v", err)
	}
	empty := &sentImages{}
	if err := sendImages(nil, empty); err != nil || len(empty.sizes) != 0 {
		t.Errorf("no images: %v, %v", empty.sizes, err)
	}
}
