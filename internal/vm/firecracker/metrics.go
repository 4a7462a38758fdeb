package firecracker

import (
	"bytes"
	"encoding/json"
	"math"
	"sync"

	"flint"
	"flint/internal/vm"
)

// maxReport bounds one report of Firecracker's metrics, in bytes. Real ones have some ten thousand.
const maxReport = 1 << 20

// meter is a writer that adds up Firecracker's reports: lines of JSON whose counters begin anew in each. It is safe for
// concurrent use. Lines it cannot read are dropped.
type meter struct {
	mu   sync.Mutex
	line []byte // unfinished
	skip bool   // the unfinished line is too long
	sum  vm.Counters
}

// report is what we read of a report; the rest is some hundred counters more.
type report struct {
	Net struct {
		Rx uint64 `json:"rx_bytes_count"`
		Tx uint64 `json:"tx_bytes_count"`
	} `json:"net"`
	Block struct {
		Read  uint64 `json:"read_bytes"`
		Write uint64 `json:"write_bytes"`
	} `json:"block"`
}

// Write implements io.Writer. It never fails.
func (m *meter) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(p)
	for len(p) > 0 {
		part, rest, whole := bytes.Cut(p, []byte("\n"))
		p = rest
		if m.skip = m.skip || len(m.line)+len(part) > maxReport; !m.skip {
			m.line = append(m.line, part...)
		}
		if !whole {
			break
		}
		if !m.skip {
			m.add(m.line)
		}
		m.line, m.skip = m.line[:0], false
	}
	return n, nil
}

func (m *meter) add(line []byte) {
	var r report
	if json.Unmarshal(line, &r) != nil {
		return
	}
	for _, c := range []struct {
		to   *flint.Bytes
		more uint64
	}{{&m.sum.NetRx, r.Net.Rx}, {&m.sum.NetTx, r.Net.Tx}, {&m.sum.BlockRead, r.Block.Read}, {&m.sum.BlockWrite, r.Block.Write}} {
		if c.more <= math.MaxInt64-uint64(*c.to) {
			*c.to += flint.Bytes(c.more)
		}
	}
}

func (m *meter) counters() vm.Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sum
}
