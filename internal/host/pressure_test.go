package host

import (
	"testing"

	"flint"
)

func TestPressureIsWhatStateRefusesFor(t *testing.T) {
	var why flint.Reason
	h := New(Config{Name: "here", Pressure: func() flint.Reason { return why }})
	if got := h.State().Refuses; !got.IsZero() {
		t.Errorf("refuses %v without pressure", got)
	}
	why = flint.Because("host.disk", "the disk is nearly full")
	if got := h.State().Refuses; got != why {
		t.Errorf("refuses %v, want %v", got, why)
	}
	if got := New(Config{}).State().Refuses; !got.IsZero() {
		t.Errorf("a host that watches nothing refuses %v", got)
	}
}
