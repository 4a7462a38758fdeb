package githubsim

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// The deliveries API: what was posted, how it went, and posting it again.

func (s *Server) routeDeliveries(route router) {
	each := func(path string, read, write func(http.HandlerFunc) http.HandlerFunc) {
		route("GET", path+"/deliveries", read(s.serveDeliveries))
		route("GET", path+"/deliveries/{delivery}", read(s.serveDelivery))
		route("POST", path+"/deliveries/{delivery}/attempts", write(s.serveRedeliver))
	}
	each("/app/hook", s.asApp, s.asApp)
	for scope, permission := range map[string]string{inOrg: "organization_hooks", inRepo: "repository_hooks"} {
		read := func(h http.HandlerFunc) http.HandlerFunc { return s.may(permission, "read", h) }
		write := func(h http.HandlerFunc) http.HandlerFunc { return s.may(permission, "write", h) }
		route("GET", scope+"/hooks", read(s.serveHooks))
		route("POST", scope+"/hooks/{id}/pings", write(s.servePing))
		each(scope+"/hooks/{id}", read, write)
	}
}

// hookIn returns the hook a request is about: the App's when its path names none. The caller holds the lock of hooks.
func (k *hooks) hookIn(r *http.Request) (*hook, error) {
	for _, h := range k.list {
		if h.Scope == domainIn(r) && (h.Scope == "" || h.id == pathID(r)) {
			return h, nil
		}
	}
	return nil, errNotFound("Not Found")
}

func (s *Server) serveHooks(w http.ResponseWriter, r *http.Request) {
	var all []map[string]any
	k := s.hub.hooks
	k.mu.Lock()
	for _, h := range k.list {
		if h.Scope == domainIn(r) {
			all = append(all, h.view())
		}
	}
	k.mu.Unlock()
	s.page(w, r, "", all)
}

func (h *hook) view() map[string]any {
	config := map[string]any{"url": h.URL, "content_type": "json", "insecure_ssl": "0"}
	if h.Secret != "" {
		config["secret"] = "********"
	}
	return map[string]any{"id": h.id, "type": "Repository", "name": "web", "active": true, "events": h.Events, "config": config}
}

func (s *Server) servePing(w http.ResponseWriter, r *http.Request) {
	k := s.hub.hooks
	k.mu.Lock()
	h, err := k.hookIn(r)
	k.mu.Unlock()
	if err == nil {
		s.hub.change(func() { err = s.hub.ping(h.id) })
	}
	answer(w, http.StatusNoContent, nil, err)
}

// ping sends a hook the event that says it is set up. The caller holds the lock.
func (h *hub) ping(id int64) error {
	k := h.hooks
	k.mu.Lock()
	i := slices.IndexFunc(k.list, func(o *hook) bool { return o.id == id })
	to := k.list[i]
	k.mu.Unlock()
	body, err := json.Marshal(map[string]any{"zen": "Keep it logically awesome.", "hook_id": id, "hook": to.view()})
	if err != nil {
		return fmt.Errorf("encode ping: %w", err)
	}
	k.post(&delivery{id: h.id(), hook: to, guid: newUUID(), event: "ping", body: body})
	return nil
}

const cursorPrefix = "v1_" // makes a cursor look like nothing a client could count with

// serveDeliveries lists a hook's deliveries, the newest first.
func (s *Server) serveDeliveries(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	perPage := min(max(atoi(q.Get("per_page"), 30), 1), 100)
	before := int64(1<<63 - 1)
	if c := q.Get("cursor"); c != "" {
		id, err := strconv.ParseInt(strings.TrimPrefix(c, cursorPrefix), 10, 64)
		if err != nil || !strings.HasPrefix(c, cursorPrefix) {
			writeError(w, errUnprocessable("Validation Failed: cursor"))
			return
		}
		before = id
	}
	part, more := []map[string]any{}, false
	k := s.hub.hooks
	k.mu.Lock()
	h, err := k.hookIn(r)
	if err == nil {
		list := slices.SortedFunc(slices.Values(k.kept), func(a, b *delivery) int { return int(b.id - a.id) })
		for _, d := range list {
			if d.hook != h || d.id >= before {
				continue
			}
			if more = len(part) == perPage; more {
				break
			}
			part = append(part, d.view(false))
		}
	}
	k.mu.Unlock()
	if err != nil {
		writeError(w, err)
		return
	}
	if more {
		q.Set("cursor", fmt.Sprint(cursorPrefix, part[len(part)-1]["id"]))
		w.Header().Set("Link", s.link(r, q, "next"))
	}
	writeJSON(w, http.StatusOK, part)
}

// view renders a delivery, with what was sent and answered when it is to be whole. The caller holds the lock of hooks.
func (d *delivery) view(whole bool) map[string]any {
	v := map[string]any{
		"id": d.id, "guid": d.guid, "delivered_at": stamp(d.at), "redelivery": d.redelivery, "duration": d.took.Seconds(),
		"status": d.status, "status_code": d.code, "event": d.event, "action": orNull(d.action),
		"installation_id": nil, "repository_id": orNull(d.repository),
	}
	if d.hook.Scope == "" {
		v["installation_id"] = installationID
	}
	if whole {
		v["url"] = d.hook.URL
		v["request"] = map[string]any{"headers": flat(d.request), "payload": json.RawMessage(d.body)}
		v["response"] = map[string]any{"headers": flat(d.response), "payload": d.reply}
	}
	return v
}

func flat(h http.Header) map[string]string {
	m := map[string]string{}
	for name, values := range h {
		m[name] = strings.Join(values, ", ")
	}
	return m
}

// deliveryIn returns the delivery a request names. The caller holds the lock of hooks.
func (k *hooks) deliveryIn(r *http.Request) (*delivery, error) {
	h, err := k.hookIn(r)
	if err != nil {
		return nil, err
	}
	id, err := strconv.ParseInt(r.PathValue("delivery"), 10, 64)
	i := slices.IndexFunc(k.kept, func(d *delivery) bool { return err == nil && d.id == id && d.hook == h })
	if i < 0 {
		return nil, errNotFound("Not Found")
	}
	return k.kept[i], nil
}

func (s *Server) serveDelivery(w http.ResponseWriter, r *http.Request) {
	k := s.hub.hooks
	var v any
	k.mu.Lock()
	d, err := k.deliveryIn(r)
	if err == nil {
		v = d.view(true)
	}
	k.mu.Unlock()
	answer(w, http.StatusOK, v, err)
}

// serveRedeliver posts a delivery again, under its guid.
func (s *Server) serveRedeliver(w http.ResponseWriter, r *http.Request) {
	k := s.hub.hooks
	k.mu.Lock()
	d, err := k.deliveryIn(r)
	k.mu.Unlock()
	if err == nil {
		s.hub.read(func() {
			k.post(&delivery{
				id: s.hub.id(), hook: d.hook, guid: d.guid, event: d.event, action: d.action, repository: d.repository, redelivery: true, body: d.body,
			})
		})
	}
	answer(w, http.StatusAccepted, map[string]any{}, err)
}
