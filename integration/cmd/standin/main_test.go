package main

import (
	"io"
	"net"
	"net/http"
	"testing"
)

func TestServeAnswersHTTP(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go serve(listener)
	for range 2 {
		answer, err := http.Get("http://" + listener.Addr().String() + "/index.html")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || answer.StatusCode != http.StatusOK || string(body) != page {
			t.Errorf("%s: %q, %v", answer.Status, body, err)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"standin"}, {"standin", "serve"}, {"standin", "dance"}} {
		if err := run(args); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}
