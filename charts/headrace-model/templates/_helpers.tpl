{{- define "model.name" -}}
{{- .Values.name | default .Release.Name -}}
{{- end -}}

{{- define "model.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "model.podLabels" -}}
headrace.dev/model-deployment: {{ include "model.name" . }}
app.kubernetes.io/component: serve
{{- end -}}

{{- define "model.port" -}}
{{- dig "port" 8000 .Values.spec.engine -}}
{{- end -}}
