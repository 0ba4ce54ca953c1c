package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// streamServer serves exec, attach and port-forward. It is the library's, which knows WebSocket up to v4 of the protocol,
// in which a client cannot tell the end of its input; v5, which is all that crictl speaks over WebSocket, is served here.
// The library stays the judge of tokens.
type streamServer struct {
	streaming.Server
	runtime streaming.Runtime
	idle    time.Duration

	mu       sync.Mutex
	requests map[string]streamRequest // by token
}

// streamRequest is a call of Exec or Attach whose URL was given out.
type streamRequest struct {
	at                         time.Time
	stdin, stdout, stderr, tty bool
	run                        func(context.Context, io.Reader, io.WriteCloser, io.WriteCloser, <-chan remotecommand.TerminalSize) error
}

// tokenLife is longer than tokens are good for.
const tokenLife = 2 * time.Minute

// The channels of a connection; the first byte of a message is its channel.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelStatus
	channelResize
)

// GetExec remembers the request by its URL.
func (s *streamServer) GetExec(req *cri.ExecRequest) (*cri.ExecResponse, error) {
	resp, err := s.Server.GetExec(req)
	if err == nil {
		s.remember(resp.GetUrl(), streamRequest{
			stdin: req.GetStdin(), stdout: req.GetStdout(), stderr: req.GetStderr(), tty: req.GetTty(),
			run: func(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, resize <-chan remotecommand.TerminalSize) error {
				return s.runtime.Exec(ctx, req.GetContainerId(), req.GetCmd(), in, out, errOut, req.GetTty(), resize)
			},
		})
	}
	return resp, err
}

// GetAttach remembers the request by its URL.
func (s *streamServer) GetAttach(req *cri.AttachRequest) (*cri.AttachResponse, error) {
	resp, err := s.Server.GetAttach(req)
	if err == nil {
		s.remember(resp.GetUrl(), streamRequest{
			stdin: req.GetStdin(), stdout: req.GetStdout(), stderr: req.GetStderr(), tty: req.GetTty(),
			run: func(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, resize <-chan remotecommand.TerminalSize) error {
				return s.runtime.Attach(ctx, req.GetContainerId(), in, out, errOut, req.GetTty(), resize)
			},
		})
	}
	return resp, err
}

func (s *streamServer) remember(url string, r streamRequest) {
	r.at = time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.requests, func(_ string, r streamRequest) bool { return time.Since(r.at) > tokenLife })
	s.requests[path.Base(url)] = r
}

// take forgets the request of a URL: it is good once.
func (s *streamServer) take(url string) (streamRequest, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.requests[path.Base(url)]
	delete(s.requests, path.Base(url))
	return r, ok
}

func (s *streamServer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r, ok := s.take(req.URL.Path)
	if !ok || !wsstream.IsWebSocketRequestWithStreamCloseProtocol(req) {
		s.Server.ServeHTTP(w, req)
		return
	}
	if !s.redeem(req) {
		http.NotFound(w, req)
		return
	}
	s.serve(w, req, r)
}

// redeem takes the token of a request out of the library's hands, and tells whether it was good: a request for it that
// is no stream uses it up all the same.
func (s *streamServer) redeem(req *http.Request) bool {
	plain := (&http.Request{Method: http.MethodGet, URL: req.URL, Header: http.Header{}}).WithContext(req.Context())
	answer := &onlyCode{header: http.Header{}}
	s.Server.ServeHTTP(answer, plain)
	return answer.code == http.StatusBadRequest
}

// onlyCode keeps an answer's code.
type onlyCode struct {
	header http.Header
	code   int
}

func (o *onlyCode) Header() http.Header         { return o.header }
func (o *onlyCode) WriteHeader(code int)        { o.code = code }
func (o *onlyCode) Write(p []byte) (int, error) { return len(p), nil }

// serve speaks v5.channel.k8s.io.
func (s *streamServer) serve(w http.ResponseWriter, req *http.Request, r streamRequest) {
	channels := make([]wsstream.ChannelType, channelResize+1)
	for i := range channels {
		channels[i] = wsstream.IgnoreChannel
	}
	for i, wanted := range []bool{channelStdout: r.stdout, channelStderr: r.stderr, channelStatus: true} {
		if wanted {
			channels[i] = wsstream.WriteChannel
		}
	}
	channels[channelResize] = wsstream.ReadChannel
	if r.stdin {
		channels[channelStdin] = wsstream.ReadChannel
	}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channels}})
	conn.SetIdleTimeout(s.idle)
	_, streams, err := conn.Open(w, req)
	if err != nil {
		return // the client has been told
	}
	defer conn.Close()
	for i, t := range channels { // an empty message on the first channel tells the client that it is connected
		if t == wsstream.WriteChannel {
			streams[i].Write(nil)
			break
		}
	}
	var stdin io.Reader
	if r.stdin {
		stdin = streams[channelStdin]
	}
	output := func(channel int, wanted bool) io.WriteCloser {
		if !wanted {
			return nil
		}
		return streams[channel]
	}
	ctx, cancel := context.WithCancel(req.Context())
	defer cancel()
	sizes := make(chan remotecommand.TerminalSize)
	go readSizes(ctx, streams[channelResize], sizes)
	err = r.run(ctx, stdin, output(channelStdout, r.stdout), output(channelStderr, r.stderr), sizes)
	status, err := json.Marshal(streamEnd(err))
	if err == nil {
		streams[channelStatus].Write(status)
	}
}

// readSizes passes on the sizes of a client's terminal, and takes what else comes on their channel.
func readSizes(ctx context.Context, from io.Reader, to chan<- remotecommand.TerminalSize) {
	defer close(to)
	for decoder := json.NewDecoder(from); ; {
		var size remotecommand.TerminalSize
		if err := decoder.Decode(&size); err != nil {
			io.Copy(io.Discard, from) // else a client's next message would stop its whole connection
			return
		}
		select {
		case to <- size:
		case <-ctx.Done():
			io.Copy(io.Discard, from)
			return
		}
	}
}

// streamStatus is Kubernetes' Status, as clients of exec and attach read it.
type streamStatus struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *streamDetails `json:"details,omitempty"`
	Code    int            `json:"code,omitempty"`
}

type streamDetails struct {
	Causes []streamCause `json:"causes"`
}

type streamCause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// streamEnd tells how an exec or attach ended.
func streamEnd(err error) streamStatus {
	var exit exitError
	switch {
	case err == nil:
		return streamStatus{Status: "Success"}
	case errors.As(err, &exit):
		return streamStatus{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason, Message: exit.Error(),
			Details: &streamDetails{Causes: []streamCause{{remotecommand.ExitCodeCauseType, fmt.Sprint(exit.code)}}},
		}
	}
	return streamStatus{Status: "Failure", Reason: "InternalError", Message: err.Error(), Code: http.StatusInternalServerError}
}
