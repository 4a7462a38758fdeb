package githubsim

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// unanswered is the status GitHub gives a delivery nobody answered.
const unanswered = "failed to connect to host"

// header is what a delivery is sent with.
func (d *delivery) header() http.Header {
	h := http.Header{}
	h.Set("Accept", "*/*")
	h.Set("Content-Type", "application/json")
	h.Set("User-Agent", hookAgent)
	// As GitHub spells them, which is not Go's canonical form; servers canonicalise.
	h["X-GitHub-Event"] = []string{d.event}
	h["X-GitHub-Delivery"] = []string{d.guid}
	h["X-GitHub-Hook-ID"] = []string{strconv.FormatInt(d.hook.id, 10)}
	target, id := "integration", int64(appID)
	if owner, repo, _ := strings.Cut(d.hook.Scope, "/"); repo != "" {
		target, id = "repository", d.repository
	} else if owner != "" {
		target, id = "organization", ownerID
	}
	h["X-GitHub-Hook-Installation-Target-Type"] = []string{target}
	h["X-GitHub-Hook-Installation-Target-ID"] = []string{strconv.FormatInt(id, 10)}
	if d.hook.Secret != "" {
		h["X-Hub-Signature-256"] = []string{"sha256=" + sign([]byte(d.hook.Secret), d.body)}
	}
	return h
}

// sign returns the hexadecimal HMAC-SHA256 of body.
func sign(secret, body []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	return hex.EncodeToString(mac.Sum(nil))
}

// send delivers once and records how it went.
func (k *hooks) send(ctx context.Context, d *delivery) {
	header, start := d.header(), k.now()
	code, response, reply, err := k.exchange(ctx, d, header)
	status := http.StatusText(code)
	if err != nil {
		status = unanswered
		if ctx.Err() == nil {
			k.log.Warn("deliver webhook", "event", d.event, "guid", d.guid, "err", err)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d.at, d.took, d.code, d.status = start, k.now().Sub(start), code, status
	d.request, d.response, d.reply = header, response, reply
	k.keep(d)
}

func (k *hooks) exchange(ctx context.Context, d *delivery, header http.Header) (code int, response http.Header, reply string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.hook.URL, bytes.NewReader(d.body))
	if err != nil {
		return 0, nil, "", fmt.Errorf("make request: %w", err)
	}
	req.Header = header.Clone()
	resp, err := k.client.Do(req)
	if err != nil {
		return 0, nil, "", fmt.Errorf("post: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return 0, nil, "", fmt.Errorf("read answer: %w", err)
	}
	return resp.StatusCode, resp.Header, string(b), nil
}
