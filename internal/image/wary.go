package image

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
)

// wary follows a registry's redirects, to the storage of its blobs as a rule, but not into the network of this machine, and not out of
// TLS. What others than the registry say of an error is left out of ours.
type wary struct{ inner http.RoundTripper }

// redirectError says where a registry sent us and why we do not go. It has no more than the host: an address may be signed.
type redirectError struct{ to, why string }

// Error implements error.
func (e *redirectError) Error() string {
	return fmt.Sprintf("the registry sends us to %s, %s", e.to, e.why)
}

// RoundTrip implements http.RoundTripper.
func (w wary) RoundTrip(req *http.Request) (*http.Response, error) {
	first := req
	for first.Response != nil && first.Response.Request != nil { // what the client was redirected by
		first = first.Response.Request
	}
	elsewhere := req.URL.Hostname() != first.URL.Hostname()
	switch {
	case first.URL.Scheme == "https" && req.URL.Scheme != "https":
		return nil, &redirectError{req.URL.Host, "and out of TLS"}
	case elsewhere && inner(req.URL.Hostname()):
		return nil, &redirectError{req.URL.Host, "which is no public address"}
	}
	resp, err := w.inner.RoundTrip(req)
	if err == nil && elsewhere && resp.StatusCode >= http.StatusBadRequest {
		resp.Body.Close()
		resp.Body = http.NoBody
	}
	return resp, err
}

// inner reports whether a host is an address of this machine or its network. What names stand for is not looked up.
func inner(host string) bool {
	if host = strings.ToLower(strings.TrimSuffix(host, ".")); host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	a = a.Unmap().WithZone("")
	return err == nil && (!a.IsGlobalUnicast() || a.IsPrivate())
}
