#!/usr/bin/env bash
# plotly 7.1.0. A page of `write_html(include_plotlyjs=True)` is meant to need no network.
# A good engineer guesses: its buttons draw, zoom and save, and the data stay on the machine.
# What happens: by default each picture has a button "Share chart...". Its dialog says that the chart will be uploaded to Plotly Cloud (https://cloud.plotly.com).
# The configuration `showSendToCloud: False` removes it. It is on by default in this release's plotly.js.
# Needs a Chromium (Debian: chromium). The button is only looked for, never pressed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check plotly==7.1.0 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import plotly.graph_objects as go

figure = go.Figure(go.Scatter(x=[1, 2], y=[1, 2]))
figure.write_html("default.html", include_plotlyjs=True)
figure.write_html("told.html", include_plotlyjs=True, config={"showSendToCloud": False})
PYTHON
cd "$work"
venv/bin/python run.py
for page in default told; do
    HOME="$work" timeout 100 "$browser" --headless=new --no-sandbox --disable-gpu --user-data-dir="$work/profile" --virtual-time-budget=20000 \
        --dump-dom "file://$work/$page.html" 2>/dev/null | grep -o 'data-title="[^"]*"' > "$page.buttons" || true
    if grep -q Share "$page.buttons"; then echo "$page: a button that shares the chart"; else echo "$page: no such button, $(grep -c Download "$page.buttons" || true) to download"; fi
done > seen
cat seen
diff seen - <<'EXPECTED'
default: a button that shares the chart
told: no such button, 1 to download
EXPECTED
echo "as described"
