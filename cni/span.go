package cni

import (
	"context"
	"strings"
)

type spanKey struct{}

// WithSpans has begin called when a plugin is started on behalf of ctx, with the plugin's name, and the function that it
// returns when the plugin has ended, however it did. Plugins that plugins start (IPAM) are within them.
func WithSpans(ctx context.Context, begin func(plugin string) func()) context.Context {
	return context.WithValue(ctx, spanKey{}, begin)
}

// span begins a plugin's span, if anybody wants to know.
func span(ctx context.Context, plugin string, environ []string) func() {
	begin, ok := ctx.Value(spanKey{}).(func(string) func())
	if !ok {
		return func() {}
	}
	for _, kv := range environ { // other verbs, such as VERSION, are no work on a pod
		if verb, ok := strings.CutPrefix(kv, "CNI_COMMAND="); ok && (verb == "ADD" || verb == "DEL") {
			return begin(plugin)
		}
	}
	return func() {}
}
